"""Additive-margin softmax (Wang et al. 2018, arXiv:1801.05599, equation 5)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from speech_flax.losses.classification import cross_entropy

_SMALLEST_NORM = 1e-12


def additive_margin_softmax(
    embeddings: Float[Array, "batch dimensions"],
    weight: Float[Array, "dimensions classes"],
    labels: Int[Array, "batch"],
    *,
    scale: float = 30.0,
    margin: float = 0.4,
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Cross-entropy of scaled cosines between embeddings and class vectors, that of the right class less a margin.

    Returns:
      The losses, and which labels count: those that are not -100; the others' loss is 0.
    """
    cosines = jnp.matmul(
        _unit(embeddings.astype(jnp.float32), 1), _unit(weight.astype(jnp.float32), 0), precision=lax.Precision.HIGHEST
    )
    is_label = jnp.arange(weight.shape[1]) == labels[:, None]
    return cross_entropy(scale * (cosines - margin * is_label), labels)


def _unit(vectors: Array, axis: int) -> Array:
    """Vectors of length 1. The root is taken of no zero, whose gradient would be infinite."""
    squared = jnp.square(vectors).sum(axis, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(squared, _SMALLEST_NORM**2))
