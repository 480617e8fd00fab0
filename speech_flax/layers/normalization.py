"""Normalisation as PyTorch computes it: in float32, with the variance taken in two passes."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from speech_flax.layers.masks import length_mask


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016) in float32, with the variance taken in two passes.

    The one-pass variance that Flax uses by default loses two digits on features with a large mean.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.ones, (inputs.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (inputs.shape[-1],))
        values = inputs.astype(jnp.float32)
        centred = values - values.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred / jnp.sqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class InstanceNorm(nn.Module):
    """Normalisation of each channel over all frames, or over the first ``lengths`` of a row (Ulyanov et al. 2016).

    It is group norm with one channel per group.
    """

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch frames channels"], lengths: Int[Array, "batch"] | None = None
    ) -> Float[Array, "batch frames channels"]:
        scale = self.param("scale", nn.initializers.ones, (inputs.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (inputs.shape[-1],))
        values = inputs.astype(jnp.float32)
        counted = None if lengths is None else length_mask(jnp.maximum(lengths, 1), inputs.shape[1])[:, :, None]
        centred = values - values.mean(1, keepdims=True, where=counted)
        variance = jnp.square(centred).mean(1, keepdims=True, where=counted)
        return (centred / jnp.sqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)
