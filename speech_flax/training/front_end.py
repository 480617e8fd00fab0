"""From waveforms to what a model takes, on the device and inside the step."""

import dataclasses
from functools import partial
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from speech_flax.audio.log_mel import log_mel
from speech_flax.layers.masks import length_mask
from speech_flax.layers.sharding import map_rows

#: Added to the variance, as Transformers does.
_VARIANCE_FLOOR = 1e-7


@runtime_checkable
class FrontEnd(Protocol):
    """Computes what a feature extractor does with each waveform alone."""

    def __call__(
        self, waveforms: Float[Array, "batch samples"], sample_lengths: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch ..."], Bool[Array, "batch positions"]]:
        """Inputs of the model, and which of their frames (or samples) are audio."""


@dataclasses.dataclass(frozen=True)
class LogMelFrontEnd:
    """Stacked, normalised log-mel frames for Wav2Vec2-BERT; ``padding_value`` fills features past the end."""

    num_mel_bins: int = 80
    stride: int = 2
    padding_value: float = 0.0

    def __call__(
        self, waveforms: Float[Array, "batch samples"], sample_lengths: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch frames features"], Bool[Array, "batch frames"]]:
        settings = dataclasses.asdict(self)
        return map_rows(partial(log_mel, **settings), waveforms, sample_lengths)


@dataclasses.dataclass(frozen=True)
class WaveformFrontEnd:
    """Samples for HuBERT, those of each utterance with mean 0 and variance 1 if ``do_normalize``; padding is 0.

    There is always a mask, also for models whose feature extractor makes none: those are applied to utterances without
    padding, which is what training must resemble.
    """

    do_normalize: bool = True

    def __call__(
        self, waveforms: Float[Array, "batch samples"], sample_lengths: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch samples"], Bool[Array, "batch samples"]]:
        mask = length_mask(sample_lengths, waveforms.shape[1])
        if not self.do_normalize:
            return jnp.where(mask, waveforms, 0), mask
        count = jnp.maximum(sample_lengths, 1)[:, None]
        centred = jnp.where(mask, waveforms - waveforms.sum(1, keepdims=True, where=mask) / count, 0)
        variance = jnp.square(centred).sum(1, keepdims=True) / count
        return centred * lax.rsqrt(variance + _VARIANCE_FLOOR), mask
