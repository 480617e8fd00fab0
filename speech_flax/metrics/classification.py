"""Accuracy and F1 of classes, and errors of labels in time."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool


def accuracy(references: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Share of predictions that are right."""
    return float(np.mean([left == right for left, right in zip(references, predictions, strict=True)]))


def macro_f1(references: Sequence[Hashable], predictions: Sequence[Hashable]) -> float:
    """Mean over classes of the harmonic mean of precision and recall.

    The classes are those that occur among references or predictions.
    """
    pairs = list(zip(references, predictions, strict=True))
    scores = []
    for name in {*references, *predictions}:
        right = sum(left == right == name for left, right in pairs)
        either = sum((left == name) + (right == name) for left, right in pairs)
        scores.append(2 * right / either)
    return float(np.mean(scores))


@dataclasses.dataclass(frozen=True)
class FrameCounts:
    """Decisions about labels of frames, each of which may hold or not; counts of parts add up to those of the whole.

    ``wrong_frames`` have any wrong decision; ``hits``, ``misses`` and ``false_alarms`` count labels of frames.
    """

    frames: int = 0
    wrong_frames: int = 0
    hits: int = 0
    misses: int = 0
    false_alarms: int = 0

    @classmethod
    def of(
        cls, reference: Bool[np.ndarray, "frames labels"], prediction: Bool[np.ndarray, "frames labels"]
    ) -> "FrameCounts":
        """The counts of one utterance."""
        wrong = (reference != prediction).any(-1)
        hits, misses, false_alarms = reference & prediction, reference & ~prediction, ~reference & prediction
        return cls(len(wrong), *(int(part.sum()) for part in (wrong, hits, misses, false_alarms)))

    def __add__(self, other: "FrameCounts") -> "FrameCounts":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return FrameCounts(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def error_rate(self) -> float:
        """Share of frames with any wrong decision."""
        return self.wrong_frames / max(self.frames, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall over all labels of all frames, each second of speech counting alike;
        1 if there is nothing to find and nothing found."""
        either = 2 * self.hits + self.misses + self.false_alarms
        return 2 * self.hits / either if either else 1.0
