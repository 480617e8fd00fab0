"""What feature extractors share: arrays by name, and the file that describes an extractor."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_FILE = "preprocessor_config.json"
#: Where Transformers 5 keeps the same fields, under ``feature_extractor``.
PROCESSOR_FILE = "processor_config.json"


class BatchFeature(dict):
    """Arrays by name, also as attributes; ``model.apply(variables, **features)`` takes it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class FeatureExtractor:
    """Base of the feature extractors: reading and writing ``preprocessor_config.json``."""

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

    def to_dict(self) -> dict[str, Any]:
        """The content of ``preprocessor_config.json``."""
        raise NotImplementedError

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``preprocessor_config.json`` into ``directory``, which is made if it does not exist."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(directory) / CONFIG_FILE).write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


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
