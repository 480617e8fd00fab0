"""Attention in plain JAX: the definition, and the same in blocks of queries for long inputs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.dropout import kept
from speech_flax.kernels.positions import Positions, Relative

#: Score of keys that do not count, in every other formulation: finite, so that differences are no NaN.
MASKED = -1e30

_BLOCK = 256

Heads = Float[Array, "batch heads frames head_size"]


def attend(
    query: Float[Array, "batch heads queries head_size"],
    key: Float[Array, "batch heads keys head_size"],
    value: Float[Array, "batch heads keys head_size"],
    mask: Bool[Array, "batch keys"],
    positions: Positions = None,
    dropout_rate: float = 0.0,
    seeds: Int[Array, "batch heads"] | None = None,
    first_query: int | Int[Array, ""] = 0,
) -> tuple[Float[Array, "batch heads queries head_size"], Float[Array, "batch heads queries keys"]]:
    """Attention of a block of queries to all keys; scores and softmax in float32.

    Args:
      mask: ``True`` for keys that count. Where none does, all get the same probability.
      positions: Scores added to those of content, before both are scaled by the root of the head size.
      dropout_rate: Share of the probabilities that are set to zero.
      seeds: Of the dropout; see :func:`~speech_flax.kernels.dropout.head_seeds`.
      first_query: Frame of the block's first query.

    Returns:
      The attended values, and the probabilities after dropout.
    """
    num_keys = key.shape[2]
    content = query + positions.content_bias[:, None] if isinstance(positions, Relative) else query
    scores = jnp.einsum("bhld,bhrd->bhlr", content, key, preferred_element_type=jnp.float32)
    if positions is not None:
        scores = scores + positions.scores(query, first_query, num_keys)
    scores = jnp.where(mask[:, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout_rate:
        queries, keys = jnp.arange(query.shape[2])[:, None] + first_query, jnp.arange(num_keys)[None]
        probabilities = jnp.where(kept(seeds, queries, keys, dropout_rate), probabilities / (1 - dropout_rate), 0)
    return jnp.einsum("bhlr,bhrd->bhld", probabilities, value), probabilities


def attend_in_blocks(
    query: Heads,
    key: Heads,
    value: Heads,
    mask: Bool[Array, "batch frames"],
    positions: Positions = None,
    dropout_rate: float = 0.0,
    seeds: Int[Array, "batch heads"] | None = None,
) -> Heads:
    """:func:`attend` for one block of queries after another, each recomputed in the backward pass.

    Memory grows with one side of the score matrix instead of with both.
    """
    batch, heads, frames, head_size = query.shape
    blocks = -(-frames // _BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, blocks * _BLOCK - frames), (0, 0)))
    by_block = jnp.moveaxis(padded.reshape(batch, heads, blocks, _BLOCK, head_size), 2, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(block: tuple[Array, Array]) -> Array:
        index, queries = block
        return attend(queries, key, value, mask, positions, dropout_rate, seeds, index * _BLOCK)[0]

    attended = lax.map(one, (jnp.arange(blocks), by_block))
    return jnp.moveaxis(attended, 0, 2).reshape(batch, heads, blocks * _BLOCK, head_size)[:, :, :frames]
