"""Audio files to text: long recordings are cut into overlapping chunks and joined again."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

import speech_flax
from speech_flax.configuration import HubertConfig
from speech_flax.layers.masks import adapter_output_lengths, convolution_output_lengths
from speech_flax.processing import Processor

_SAMPLING_RATE = 16_000
#: Shorter inputs are padded to this, longer ones to the next doubling, so that few shapes are compiled (seconds).
_SHORTEST = 2.56


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
    """A CTC model of either family with its processor, ready for waveforms of any length.

    A recording longer than ``chunk_seconds`` is read in chunks of that length. Of two neighbours, which overlap by
    twice ``margin_seconds``, each contributes the frames up to the middle of the overlap: every frame but those at the
    two ends of the recording is predicted with at least ``margin_seconds`` of context on either side. (HuBERT's last
    frame reaches a little beyond its share of the samples; a chunk is that much longer, so that none is missing.)

    Raises:
        ValueError: when the margins leave nothing of a chunk.
    """

    def __init__(
        self,
        model: nn.Module,
        params: PyTree,
        processor: Processor,
        *,
        chunk_seconds: float = 30.0,
        margin_seconds: float = 4.0,
    ):
        self.processor = processor
        extractor, config = processor.feature_extractor, model.config
        if config.model_type == "hubert":
            self._position, self._ratio = 1 / _SAMPLING_RATE, config.inputs_to_logits_ratio
            self._reach = max(0, _receptive_field(config) - self._ratio)
            self._output_lengths = convolution_output_lengths
        else:
            self._position = extractor.stride * 0.01  # seconds: log-mel frames are 10 ms apart
            self._ratio = config.adapter_stride**config.num_adapter_layers if config.add_adapter else 1
            self._reach = 0
            self._output_lengths = adapter_output_lengths
        self._chunk = self._whole_frames(chunk_seconds)
        self._margin = self._whole_frames(margin_seconds)
        if not 0 <= 2 * self._margin < self._chunk:
            raise ValueError(
                f"margins of {margin_seconds:g} s on both sides leave nothing of a chunk of {chunk_seconds:g} s; "
                "make the chunk longer than twice the margin"
            )
        self._config = config
        self._predict = partial(jax.jit(_frame_labels, static_argnames="model"), model=model, params=params)

    @classmethod
    def from_pretrained(
        cls, directory_or_hub_id: str | Path, *, dtype: Any = jnp.float32, **chunking: float
    ) -> "Transcriber":
        """The CTC model in a directory or on the hub, with its processor.

        The model computes with the compatibility ``"corrected"``: padding to one of few shapes then changes nothing,
        so that every chunk gets what Transformers computes for it alone.

        Raises:
            ValueError: when it is no CTC model.
        """
        model, params = speech_flax.AutoModel.from_pretrained(
            directory_or_hub_id, dtype=dtype, compatibility="corrected"
        )
        if not type(model).__name__.endswith("ForCTC"):
            raise ValueError(f"{directory_or_hub_id} holds a {type(model).__name__}, which does not transcribe")
        name = "Wav2Vec2Processor" if model.config.model_type == "hubert" else "Wav2Vec2BertProcessor"
        return cls(model, params, getattr(speech_flax, name).from_pretrained(directory_or_hub_id), **chunking)

    def _whole_frames(self, seconds: float) -> int:
        """Input positions (log-mel vectors or samples) in ``seconds``, a multiple of those that make one frame."""
        return round(seconds / self._position / self._ratio) * self._ratio

    def __call__(self, waveform: Float[np.ndarray, "samples"]) -> Transcript:
        """Transcribe one 16 kHz mono waveform."""
        tokenizer = self.processor.tokenizer
        labels = np.concatenate(list(self._chunk_labels(self._inputs(waveform))))
        decoded = tokenizer.decode(labels.tolist(), output_word_offsets=True)
        frame = self._position * self._ratio
        words = [
            Word(item["word"], round(item["start_offset"] * frame, 3), round(item["end_offset"] * frame, 3))
            for item in decoded.word_offsets
        ]
        return Transcript(decoded.text, words, len(waveform) / _SAMPLING_RATE)

    def _inputs(self, waveform: Float[np.ndarray, "samples"]) -> Float[np.ndarray, "positions ..."]:
        """What the feature extractor makes of the whole recording."""
        inputs = self.processor.feature_extractor(waveform, sampling_rate=_SAMPLING_RATE, return_tensors="np")
        if "input_values" in inputs:
            return inputs["input_values"][0]
        return inputs["input_features"][0][inputs["attention_mask"][0].astype(bool)]

    def _chunk_labels(self, inputs: Float[np.ndarray, "positions ..."]) -> Iterator[Int[np.ndarray, "chunk_frames"]]:
        """Frame labels, chunk after chunk, each without the frames that its neighbours contribute."""
        step = self._chunk - 2 * self._margin
        read = self._chunk + self._reach
        start = 0
        while True:
            last = start + read >= len(inputs)
            labels = self._labels(inputs[start : start + read])
            first_kept = self._margin // self._ratio if start else 0
            yield labels[first_kept:] if last else labels[first_kept : (self._chunk - self._margin) // self._ratio]
            if last:
                return
            start += step

    def _labels(self, inputs: Float[np.ndarray, "positions ..."]) -> Int[np.ndarray, "output_frames"]:
        """Greedy label of every output frame; lengths are padded to few static shapes."""
        length = len(inputs)
        frames = max(0, int(self._output_lengths(jnp.array([length]), self._config)[0]))
        if frames == 0:
            return np.zeros(0, np.int32)
        padded = round(_SHORTEST / self._position)
        while padded < length:
            padded *= 2
        longest = self._chunk + self._reach
        padded = length if length == longest else min(padded, longest)
        block = np.zeros((1, padded, *inputs.shape[1:]), np.float32)
        block[0, :length] = inputs
        mask = (np.arange(padded) < length).astype(np.int32)[None]
        return np.asarray(self._predict(inputs=block, attention_mask=mask))[0, :frames]


def _receptive_field(config: HubertConfig) -> int:
    """Samples that one frame of the convolutions is made of."""
    samples = 1
    for width, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + width
    return samples


def _frame_labels(model: nn.Module, params: PyTree, inputs: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return model.apply({"params": params}, inputs, attention_mask).logits.argmax(-1)
