"""Cross-entropies of one class, or of several labels at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

#: A label with this id does not count, as in PyTorch.
IGNORED = -100


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """Negative log probability of each label, and which labels count: not -100, whose loss is 0."""
    counted = labels != IGNORED
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(counted, -chosen, 0.0), counted


def binary_cross_entropy(
    logits: Float[Array, "*batch labels"], targets: Shaped[Array, "*batch labels"]
) -> Float[Array, "*batch"]:
    """Negative log probability of which labels are present (1) and absent (0), each for itself; mean over labels."""
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    return (jax.nn.softplus(logits) - targets * logits).mean(-1)


def mean_of_counted(losses: Float[Array, "*batch"], counted: Bool[Array, "*batch"]) -> Float[Array, ""]:
    """Mean of the losses that count; 0 when none does."""
    return jnp.where(counted, losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)
