"""Audio files to text: long recordings are cut into overlapping chunks and joined again."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from speech_flax.layers.masks import adapter_output_lengths
from speech_flax.processing import Wav2Vec2BertProcessor

_SHORTEST = 128  # frames; shorter inputs are padded to it, longer ones to the next doubling


@dataclasses.dataclass(frozen=True)
class Word:
    """A word and where it was heard, in seconds."""

    word: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Transcript:
    """Text of one recording of ``seconds`` length, and its words in time."""

    text: str
    words: list[Word]
    seconds: float


class Transcriber:
    """A CTC model with its processor, ready for waveforms of any length.

    A recording longer than ``chunk_seconds`` is read in chunks of that length. Of two neighbours, which overlap by
    twice ``margin_seconds``, each contributes the frames up to the middle of the overlap: every frame but those at the
    two ends of the recording is predicted with at least ``margin_seconds`` of context on either side.

    Raises:
        ValueError: when the margins leave nothing of a chunk.
    """

    def __init__(
        self,
        model: nn.Module,
        params: PyTree,
        processor: Wav2Vec2BertProcessor,
        *,
        chunk_seconds: float = 30.0,
        margin_seconds: float = 4.0,
    ):
        self.processor = processor
        extractor, config = processor.feature_extractor, model.config
        self._input_frame = extractor.stride * 0.01  # seconds: log-mel frames are 10 ms apart
        self._ratio = config.adapter_stride**config.num_adapter_layers if config.add_adapter else 1
        self._chunk = self._whole_frames(chunk_seconds)
        self._margin = self._whole_frames(margin_seconds)
        if not 0 <= 2 * self._margin < self._chunk:
            raise ValueError(
                f"margins of {margin_seconds:g} s on both sides leave nothing of a chunk of {chunk_seconds:g} s; "
                "make the chunk longer than twice the margin"
            )
        self._config = config
        self._predict = partial(jax.jit(_frame_labels, static_argnames="model"), model=model, params=params)

    def _whole_frames(self, seconds: float) -> int:
        """Input frames in ``seconds``, a multiple of those that make one output frame."""
        return round(seconds / self._input_frame / self._ratio) * self._ratio

    def __call__(self, waveform: Float[np.ndarray, "samples"]) -> Transcript:
        """Transcribe one 16 kHz mono waveform."""
        extractor, tokenizer = self.processor.feature_extractor, self.processor.tokenizer
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="np")
        features = inputs["input_features"][0][inputs["attention_mask"][0].astype(bool)]
        labels = np.concatenate(list(self._chunk_labels(features)))
        decoded = tokenizer.decode(labels.tolist(), output_word_offsets=True)
        frame = self._input_frame * self._ratio
        words = [
            Word(item["word"], round(item["start_offset"] * frame, 3), round(item["end_offset"] * frame, 3))
            for item in decoded.word_offsets
        ]
        return Transcript(decoded.text, words, len(waveform) / 16_000)

    def _chunk_labels(
        self, features: Float[np.ndarray, "frames features"]
    ) -> Iterator[Int[np.ndarray, "chunk_frames"]]:
        """Frame labels, chunk after chunk, each without the frames that its neighbours contribute."""
        step = self._chunk - 2 * self._margin
        start = 0
        while True:
            last = start + self._chunk >= len(features)
            labels = self._labels(features[start : start + self._chunk])
            first_kept = self._margin // self._ratio if start else 0
            yield labels[first_kept:] if last else labels[first_kept : (self._chunk - self._margin) // self._ratio]
            if last:
                return
            start += step

    def _labels(self, features: Float[np.ndarray, "frames features"]) -> Int[np.ndarray, "output_frames"]:
        """Greedy label of every output frame; lengths are padded to few static shapes."""
        frames = len(features)
        padded = _SHORTEST
        while padded < frames:
            padded *= 2
        padded = frames if frames == self._chunk else min(padded, self._chunk)
        block = np.zeros((1, padded, features.shape[1]), np.float32)
        block[0, :frames] = features
        mask = (np.arange(padded) < frames).astype(np.int32)[None]
        labels = np.asarray(self._predict(features=block, attention_mask=mask))[0]
        return labels[: int(adapter_output_lengths(jnp.array([frames]), self._config)[0])]


def _frame_labels(model: nn.Module, params: PyTree, features: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return model.apply({"params": params}, features, attention_mask).logits.argmax(-1)
