"""What feature extractors share: arrays by name, padding, and the file that describes an extractor."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

logger = logging.getLogger(__name__)

CONFIG_FILE = "preprocessor_config.json"
#: Where Transformers 5 keeps the same fields, under ``feature_extractor``.
PROCESSOR_FILE = "processor_config.json"
#: Ways to pad; ``True`` is ``"longest"`` and ``False`` is ``"do_not_pad"``.
_PADDINGS = (True, False, "longest", "max_length", "do_not_pad")


class BatchFeature(dict):
    """Arrays by name, also as attributes; ``model.apply(variables, **features)`` takes it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class FeatureExtractor:
    """Base of the feature extractors: padding, and reading and writing ``preprocessor_config.json``."""

    input_name: ClassVar[str]
    sampling_rate: int
    padding_value: float
    return_attention_mask: bool

    @classmethod
    def from_pretrained(cls, directory_or_hub_id: str | Path, **changes: Any) -> "FeatureExtractor":
        """The extractor that ``preprocessor_config.json`` in a directory or on the hub describes.

        Raises:
            FileNotFoundError: when there is no such file.
        """
        from speech_flax.pretrained import pretrained_directory

        directory = pretrained_directory(directory_or_hub_id)
        if (directory / CONFIG_FILE).is_file():
            return cls(**(_read(directory / CONFIG_FILE) | changes))
        if (directory / PROCESSOR_FILE).is_file():
            return cls(**(_read(directory / PROCESSOR_FILE).get("feature_extractor", {}) | changes))
        raise FileNotFoundError(
            f"{directory / CONFIG_FILE} does not exist: {directory_or_hub_id} holds no feature extractor"
        )

    def pad(
        self,
        features: Sequence[dict[str, Any]] | dict[str, Any],
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = "np",
    ) -> BatchFeature:
        """What was extracted before, cut and padded: the input ``[batch, length, ...]`` and, if wanted, its
        ``attention_mask`` ``[batch, length]``.

        Args:
            features: One dictionary per utterance, or one of lists or arrays; masks that come along are kept, others
                are all ones. Lengths are those of the input: samples, or vectors of stacked frames.
            padding: To the longest (``True`` or ``"longest"``), to ``max_length`` (``"max_length"``), or not at all
                (``False`` or ``"do_not_pad"``).
            max_length: Length to pad or, with ``truncation``, to cut to.
            truncation: Cut to ``max_length``.
            pad_to_multiple_of: Rounds up the padded length, and ``max_length``.
            return_attention_mask: Whether to return the mask; default: as the extractor was made.
            return_tensors: ``"np"``, ``"jax"``, or ``None`` for lists of arrays.

        Raises:
            ValueError: for features without the input, another ``padding``, a missing ``max_length``, or utterances of
                unequal length without padding into one array.
        """
        if padding not in _PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(map(repr, _PADDINGS))}, not {padding!r}")
        if (truncation or padding == "max_length") and max_length is None:
            raise ValueError("truncation and padding to 'max_length' need max_length")
        multiple = pad_to_multiple_of or 1
        max_length = None if max_length is None else -(-max_length // multiple) * multiple
        cut = max_length if truncation else None
        pairs = [(values[:cut], mask[:cut]) for values, mask in self._inputs_and_masks(features)]
        length = 0
        if padding == "max_length":
            length = max_length
        elif padding and padding != "do_not_pad":
            length = -(-max((len(values) for values, _ in pairs), default=0) // multiple) * multiple
        output = BatchFeature({self.input_name: [extended(values, length, self.padding_value) for values, _ in pairs]})
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            output["attention_mask"] = [extended(mask, length, 0) for _, mask in pairs]
        return output if return_tensors is None else as_arrays(output, return_tensors)

    def _inputs_and_masks(
        self, features: Sequence[dict[str, Any]] | dict[str, Any]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        if isinstance(features, dict):
            names = [name for name in (self.input_name, "attention_mask") if name in features]
            columns = (features[name] for name in names)
            features = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        pairs = []
        for item in features:
            if self.input_name not in item:
                raise ValueError(f"features to pad need {self.input_name!r}, but have {', '.join(map(repr, item))}")
            values = np.asarray(item[self.input_name], np.float32)
            mask = item.get("attention_mask")
            pairs.append((values, np.ones(len(values), np.int32) if mask is None else np.asarray(mask, np.int32)))
        return pairs

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``."""
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``preprocessor_config.json`` into ``directory``, which is made if it does not exist."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(directory) / CONFIG_FILE).write_text(text, encoding="utf-8")

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning("sampling_rate was not given: waveforms are taken to be at %d Hz", self.sampling_rate)
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the model was trained at {self.sampling_rate} Hz, but the audio has {sampling_rate} Hz; resample it"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def extended(values: np.ndarray, length: int, padding_value: int | float) -> np.ndarray:
    """``values`` with ``padding_value`` behind them, up to ``length``; themselves if they are as long."""
    missing = length - len(values)
    if missing <= 0:
        return values
    return np.pad(values, ((0, missing), *[(0, 0)] * (values.ndim - 1)), constant_values=padding_value)


def as_arrays(features: BatchFeature, kind: str) -> BatchFeature:
    """Lists with one entry per utterance as arrays of NumPy (``"np"``) or JAX (``"jax"``).

    Raises:
        ValueError: for another kind, or entries of unequal length.
    """
    if kind not in ("np", "jax"):
        raise ValueError(f"return_tensors must be 'np' or 'jax', not {kind!r}")
    lengths = {len(one) for one in next(iter(features.values()))}
    if len(lengths) > 1:
        raise ValueError(f"utterances of length {min(lengths)} to {max(lengths)} make no array; pad them")
    arrays = BatchFeature({name: np.stack(values) for name, values in features.items()})
    if kind == "jax":
        import jax.numpy as jnp

        arrays = BatchFeature({name: jnp.asarray(values) for name, values in arrays.items()})
    return arrays
