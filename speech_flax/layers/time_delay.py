"""Time-delay layers (Peddinti et al. 2015): dilated convolutions over frames, without padding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.linear import linear


class TimeDelayLayer(nn.Module):
    """``width`` frames, ``dilation`` apart, to one vector: ``[batch, frames, inputs]`` to ``[batch, fewer, features]``,
    where ``fewer`` is ``frames - dilation * (width - 1)``. The linear layer takes the frames side by side."""

    features: int
    width: int
    dilation: int
    initializer_range: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch frames inputs"]) -> Float[Array, "batch fewer features"]:
        fewer = hidden.shape[1] - self.dilation * (self.width - 1)
        taps = [hidden[:, tap * self.dilation :][:, :fewer] for tap in range(self.width)]
        dense = linear(self.features, name="kernel", dtype=self.dtype, initializer_range=self.initializer_range)
        return jax.nn.relu(dense(jnp.concatenate(taps, axis=-1)))


def time_delay_layers(config: Wav2Vec2BertConfig, dtype: DTypeLike) -> list[TimeDelayLayer]:
    """The layers that ``tdnn_dim``, ``tdnn_kernel`` and ``tdnn_dilation`` describe."""
    sizes = zip(config.tdnn_dim, config.tdnn_kernel, config.tdnn_dilation, strict=True)
    return [TimeDelayLayer(*size, config.initializer_range, dtype) for size in sizes]


def time_delay_context(config: Wav2Vec2BertConfig) -> int:
    """Frames that one output vector of all layers sees."""
    return 1 + sum(d * (k - 1) for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))


def time_delay_lengths(lengths: Int[Array, "batch"], config: Wav2Vec2BertConfig) -> Int[Array, "batch"]:
    """Output frames that see none but the first ``lengths`` input frames.

    Transformers forgets the dilation, so that its statistics take in a few frames of padding.
    """
    if config.compatibility == "corrected":
        return lengths - (time_delay_context(config) - 1)
    return lengths - sum(kernel - 1 for kernel in config.tdnn_kernel)
