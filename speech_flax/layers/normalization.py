"""Normalisation as PyTorch computes it: in float32, with the variance taken in two passes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from speech_flax.layers.masks import length_mask

#: Means and deviations of layer normalisation have this name for policies of rematerialisation: two numbers per frame
#: that take two passes over the states to compute.
STATISTICS = "statistics"


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
        return layer_norm(inputs, scale, bias, self.epsilon, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    inputs: Float[Array, "*batch features"],
    scale: Float[Array, "features"],
    bias: Float[Array, "features"],
    epsilon: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch features"]:
    """The normalised last axis, scaled and shifted, in ``dtype``; the backward pass finds it again from the inputs and
    from what is named ``STATISTICS``.

    Written out because XLA:CPU sums a product over rows and frames at once up to forty times more slowly than over
    both as one axis, and because XLA:TPU computes the sums of the gradient within the matrix product that its cotangent
    comes from, which then takes half as long again: it waits for the whole cotangent here.
    """
    return _layer_norm_forward(inputs, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(
    inputs: Array, scale: Array, bias: Array, epsilon: float, dtype: DTypeLike
) -> tuple[Array, tuple[Array, ...]]:
    values = inputs.astype(jnp.float32)
    mean = values.mean(-1)
    inverse = 1 / jnp.sqrt(jnp.square(values - mean[..., None]).mean(-1) + epsilon)  # one division per frame
    mean, inverse = checkpoint_name(mean, STATISTICS), checkpoint_name(inverse, STATISTICS)
    normed = (values - mean[..., None]) * inverse[..., None]
    return (normed * scale + bias).astype(dtype), (inputs, mean, inverse, scale)


def _layer_norm_backward(
    epsilon: float, dtype: DTypeLike, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    inputs, mean, inverse, scale = residuals
    inverse, cotangent = inverse[..., None], jax.lax.optimization_barrier(cotangent).astype(jnp.float32)
    normed = (inputs.astype(jnp.float32) - mean[..., None]) * inverse
    of_normed = cotangent * scale
    along, across = (of_normed * normed).mean(-1, keepdims=True), of_normed.mean(-1, keepdims=True)
    of_inputs = (of_normed - across - normed * along) * inverse
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    of_scale, of_bias = (rows * normed.reshape(rows.shape)).sum(0), rows.sum(0)
    return of_inputs.astype(inputs.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


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
        counted = jnp.ones(inputs.shape[:2], bool)
        if lengths is not None:
            counted = length_mask(jnp.maximum(lengths, 1), inputs.shape[1])
        return instance_norm(inputs, scale, bias, counted, self.epsilon).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def instance_norm(
    inputs: Float[Array, "batch frames channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    counted: Bool[Array, "batch frames"],
    epsilon: float,
) -> Float32[Array, "batch frames channels"]:
    """Every channel normalised by its statistics over the counted frames of its row, scaled and shifted.

    Its gradient is written out for the reason of :func:`layer_norm`; sums over frames of products are contractions.
    """
    return _instance_norm_forward(inputs, scale, bias, counted, epsilon)[0]


def _instance_norm_forward(
    inputs: Array, scale: Array, bias: Array, counted: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    values, where = inputs.astype(jnp.float32), counted[:, :, None]
    mean = values.mean(1, keepdims=True, where=where)
    inverse = 1 / jnp.sqrt(jnp.square(values - mean).mean(1, keepdims=True, where=where) + epsilon)
    return (values - mean) * inverse * scale + bias, (inputs, mean, inverse, scale, counted)


def _instance_norm_backward(
    epsilon: float, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, None]:
    inputs, mean, inverse, scale, counted = residuals
    normed = (inputs.astype(jnp.float32) - mean) * inverse
    products = jnp.einsum("btc,btc->bc", cotangent, normed, precision=jax.lax.Precision.HIGHEST)
    sums = cotangent.sum(1)
    share = (counted / counted.sum(1, keepdims=True))[:, :, None]
    of_normed = cotangent - share * (sums[:, None] + normed * products[:, None])
    of_inputs = of_normed * scale * inverse
    return of_inputs.astype(inputs.dtype), products.sum(0), sums.sum(0), None


instance_norm.defvjp(_instance_norm_forward, _instance_norm_backward)
