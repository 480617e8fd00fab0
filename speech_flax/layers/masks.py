"""Which frames count, before and after sub-sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from speech_flax.configuration import Wav2Vec2BertConfig


def adapter_output_lengths(lengths: Int[Array, "batch"], config: Wav2Vec2BertConfig) -> Int[Array, "batch"]:
    """Valid output frames for ``lengths`` valid input frames: the adapter's layers each divide them by their stride.

    As in Transformers, the formula pads by half the kernel (the convolution itself by half the stride, unless
    ``config.compatibility`` is "corrected").
    """
    if config.add_adapter:
        for _ in range(config.num_adapter_layers):
            lengths = sub_sampled_lengths(lengths, config)
    return lengths


def sub_sampled_lengths(lengths: Int[Array, "batch"], config: Wav2Vec2BertConfig) -> Int[Array, "batch"]:
    """Valid frames after one adapter layer."""
    kernel = config.adapter_kernel_size
    return (lengths + 2 * (kernel // 2) - kernel) // config.adapter_stride + 1


def length_mask(lengths: Int[Array, "batch"], num_frames: int) -> Bool[Array, "batch frames"]:
    """``True`` for the first ``lengths`` frames of each row."""
    return jnp.arange(num_frames) < lengths[:, None]


def as_bool_mask(
    attention_mask: Shaped[Array, "batch frames"] | None, batch: int, num_frames: int
) -> Bool[Array, "batch frames"]:
    """A given mask of numbers or booleans as booleans; all frames when none is given."""
    if attention_mask is None:
        return jnp.ones((batch, num_frames), bool)
    return jax.numpy.asarray(attention_mask).astype(bool)
