"""Labels of utterances other than transcripts: classes and values."""

import dataclasses
import math

from speech_flax.data.loader import IGNORED_LABEL


class LabelError(ValueError):
    """A label that cannot be understood, in one sentence that quotes it."""


@dataclasses.dataclass(frozen=True)
class ClassEncoder:
    """Names of classes to their numbers. A name that is not among ``names`` becomes the label that losses ignore."""

    names: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """One number."""
        return [self.names.index(text) if text in self.names else IGNORED_LABEL]


@dataclasses.dataclass(frozen=True)
class ValueEncoder:
    """Numbers in writing to numbers."""

    def encode(self, text: str) -> list[float]:
        """One number.

        Raises:
            LabelError: when it is none, or not finite.
        """
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise LabelError(f"the label {text!r} is no number; a model with one label needs numbers")
        return [value]
