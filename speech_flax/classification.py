"""Audio files to what a model with a classifying head says of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

import speech_flax
from speech_flax.outputs import SequenceClassifierOutput, TokenClassifierOutput, XVectorOutput

_SAMPLING_RATE = 16_000
_EXTRACTORS = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor", "hubert": "Wav2Vec2FeatureExtractor"}
#: Log-mel inputs are padded to a multiple of this, so that few shapes are compiled (frames).
_ROUNDING = 128


@dataclasses.dataclass(frozen=True)
class Segment:
    """``label`` holds from ``start`` to ``end`` seconds."""

    start: float
    end: float
    label: str


@dataclasses.dataclass(frozen=True)
class Classification:
    """What a model says of a recording; what it does not predict is ``None``.

    ``label`` is the most likely class, or the classes that are more likely than not if several may hold; ``scores``
    are the probabilities of all; ``value`` is that of a model with one label; ``segments`` say what holds when;
    ``embedding`` is that of the speaker, of length 1: the cosine of two is their dot product.
    """

    label: str | list[str] | None = None
    scores: dict[str, float] | None = None
    value: float | None = None
    segments: list[Segment] | None = None
    embedding: list[float] | None = None

    def known(self) -> dict[str, Any]:
        """What is predicted, as plain data."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Classifier:
    """A model for sequences, frames or speakers with its feature extractor, ready for waveforms.

    Raises:
      ValueError: the model has no such head.
    """

    def __init__(self, model: nn.Module, params: PyTree, feature_extractor: Any):
        self._config = model.config
        self._extractor = feature_extractor
        self._apply: Callable[..., Any] = jax.jit(lambda inputs: model.apply({"params": params}, **inputs))
        self._embeds = type(model).__name__.endswith("XVector")
        if not type(model).__name__.endswith(("Classification", "XVector")):
            raise ValueError(f"a {type(model).__name__} does not classify; transcribe with a CTC model")

    @classmethod
    def from_pretrained(cls, directory_or_hub_id: str | Path, **options: Any) -> "Classifier":
        """The model in a directory or on the hub, with its feature extractor."""
        model, params = speech_flax.AutoModel.from_pretrained(directory_or_hub_id, **options)
        extractor_class = getattr(speech_flax, _EXTRACTORS[model.config.model_type])
        return cls(model, params, extractor_class.from_pretrained(directory_or_hub_id))

    def __call__(self, waveform: Float[np.ndarray, "samples"]) -> Classification:
        """Classify one 16 kHz mono waveform, as a whole.

        Raises:
          ValueError: it is too short for the model.
        """
        inputs, frames = self._inputs(waveform)
        output = jax.device_get(self._apply(inputs))
        if isinstance(output, XVectorOutput):
            return Classification(embedding=(output.embeddings[0] / np.linalg.norm(output.embeddings[0])).tolist())
        if isinstance(output, TokenClassifierOutput):
            logits = output.logits[0] if frames is None else output.logits[0, :frames]
            seconds = self._frame_seconds
            return Classification(segments=segments(self._present(logits), self._config.id2label, seconds))
        return self._of_sequence(output)

    def _inputs(self, waveform: Float[np.ndarray, "samples"]) -> tuple[dict[str, np.ndarray], int | None]:
        """Inputs of the model, and how many frames are audio, if some may be none."""
        inputs = dict(self._extractor(waveform, sampling_rate=_SAMPLING_RATE, return_tensors="np"))
        if "input_features" not in inputs:
            return inputs, None  # padding would change the statistics of the convolutional layers
        features, mask = inputs["input_features"], inputs["attention_mask"]
        if not mask.any():
            raise ValueError(f"{waveform.size / _SAMPLING_RATE:.3f} s of audio are too short for one frame")
        if self._embeds:  # padding would enter the statistics, unless these are corrected
            return {"input_features": features[:, mask[0].astype(bool)]}, None
        missing = -features.shape[1] % _ROUNDING
        padded = {
            "input_features": np.pad(features, ((0, 0), (0, missing), (0, 0))),
            "attention_mask": np.pad(mask, ((0, 0), (0, missing))),
        }
        return padded, int(mask.sum())

    @property
    def _frame_seconds(self) -> float:
        if self._config.model_type == "hubert":
            return self._config.inputs_to_logits_ratio / _SAMPLING_RATE
        return 0.01 * self._extractor.stride

    def _present(self, logits: Float[np.ndarray, "frames labels"]) -> Bool[np.ndarray, "frames labels"]:
        if self._config.problem == "multi_label_classification":
            return logits > 0
        return logits.argmax(-1)[:, None] == np.arange(logits.shape[-1])

    def _of_sequence(self, output: SequenceClassifierOutput) -> Classification:
        config, logits = self._config, output.logits[0].astype(np.float64)
        if config.problem == "regression":
            return Classification(value=float(logits[0]))
        if config.problem == "multi_label_classification":
            scores = 1 / (1 + np.exp(-logits))
            label = [name for name, score in zip(config.id2label, scores, strict=True) if score > 0.5]
        else:
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            label = config.id2label[int(logits.argmax())]
        return Classification(label, dict(zip(config.id2label, scores.round(4).tolist(), strict=True)))


def segments(present: Bool[np.ndarray, "frames labels"], names: tuple[str, ...], frame_seconds: float) -> list[Segment]:
    """Uninterrupted stretches of every label, in the order of their beginnings."""
    found = []
    for column, name in zip(present.T.astype(np.int8), names, strict=True):
        edges = np.flatnonzero(np.diff(column, prepend=0, append=0)) * frame_seconds
        found += [
            Segment(round(float(start), 3), round(float(end), 3), name)
            for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]
    return sorted(found, key=lambda segment: (segment.start, segment.label))


def describe(result: Classification) -> str:
    """One line for people about anything but an embedding."""
    if result.segments is not None:
        return ", ".join(f"{s.start:.2f}-{s.end:.2f} s {s.label}" for s in result.segments) or "nothing"
    if result.value is not None:
        return f"{result.value:.4g}"
    names = [result.label] if isinstance(result.label, str) else result.label
    return ", ".join(f"{name} ({result.scores[name]:.0%})" for name in names) or "none"
