"""Multi-head self-attention with the positions of Wav2Vec2-BERT."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.layers.feed_forward import linear
from speech_flax.layers.positions import relative_key_scores, relative_scores, relative_sinusoids, rotate

#: Longer inputs are attended to in blocks of this many queries, so that memory grows with one side of the score matrix.
_BLOCK = 256
_LONGEST_WHOLE = 1024

PositionScores = Callable[[Float[Array, "batch heads queries head_size"], int | Int[Array, ""]], Array]


def attend(
    query: Float[Array, "batch heads queries head_size"],
    key: Float[Array, "batch heads keys head_size"],
    value: Float[Array, "batch heads keys head_size"],
    mask: Bool[Array, "batch keys"],
    first_query: int | Int[Array, ""],
    position_scores: PositionScores | None,
    dropout: Callable[[Array], Array],
) -> tuple[Float[Array, "batch heads queries head_size"], Float[Array, "batch heads queries keys"]]:
    """Attention of one block of queries; scores and softmax in float32.

    Args:
      mask: ``True`` for keys that count.
      first_query: Frame of the block's first query.
      position_scores: Unscaled scores added to those of content; gets the block and ``first_query``.
      dropout: Applied to the probabilities.

    Returns:
      The attended values, and the probabilities after dropout.
    """
    scores = jnp.einsum("bhld,bhrd->bhlr", query, key, preferred_element_type=jnp.float32)
    if position_scores is not None:
        scores = scores + position_scores(query, first_query)
    scores = jnp.where(mask[:, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    return jnp.einsum("bhlr,bhrd->bhld", probabilities, value), probabilities


def attend_in_blocks(
    query: Float[Array, "batch heads frames head_size"],
    key: Float[Array, "batch heads frames head_size"],
    value: Float[Array, "batch heads frames head_size"],
    mask: Bool[Array, "batch frames"],
    position_scores: PositionScores | None,
    dropout: Callable[[Array, Int[Array, ""]], Array],
) -> Float[Array, "batch heads frames head_size"]:
    """:func:`attend` for one block of queries after another, each recomputed in the backward pass."""
    batch, heads, frames, head_size = query.shape
    blocks = -(-frames // _BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, blocks * _BLOCK - frames), (0, 0)))
    by_block = jnp.moveaxis(padded.reshape(batch, heads, blocks, _BLOCK, head_size), 2, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(block: tuple[Array, Array]) -> Array:
        index, queries = block
        return attend(queries, key, value, mask, index * _BLOCK, position_scores, partial(dropout, block=index))[0]

    attended = lax.map(one, (jnp.arange(blocks), by_block))
    return jnp.moveaxis(attended, 0, 2).reshape(batch, heads, blocks * _BLOCK, head_size)[:, :, :frames]


def attend_to_all(
    query: Float[Array, "batch heads frames head_size"],
    key: Float[Array, "batch heads frames head_size"],
    value: Float[Array, "batch heads frames head_size"],
    mask: Bool[Array, "batch frames"],
    position_scores: PositionScores | None = None,
    *,
    rate: float = 0.0,
    random: PRNGKeyArray | None = None,
    output_probabilities: bool = False,
) -> tuple[Float[Array, "batch frames features"], Float[Array, "batch heads frames frames"] | None]:
    """Attention of every frame to every frame that counts, whole or in blocks of queries.

    Args:
      mask: ``True`` for frames that count.
      position_scores: See :func:`attend`.
      rate: Dropout of the probabilities, drawn from ``random``.
      output_probabilities: Return the probabilities, after dropout.

    Returns:
      The attended values, heads side by side, and the probabilities.
    """

    def dropout(probabilities: Array, block: int | Array = 0) -> Array:
        if not rate:
            return probabilities
        kept = jax.random.bernoulli(jax.random.fold_in(random, block), 1 - rate, probabilities.shape)
        return jnp.where(kept, probabilities / (1 - rate), 0)

    batch, heads, frames, head_size = query.shape
    probabilities = None
    if output_probabilities or frames <= _LONGEST_WHOLE:
        attended, probabilities = attend(query, key, value, mask, 0, position_scores, dropout)
    else:
        attended = attend_in_blocks(query, key, value, mask, position_scores, dropout)
    attended = attended.swapaxes(1, 2).reshape(batch, frames, heads * head_size)
    return attended, probabilities if output_probabilities else None


class SelfAttention(nn.Module):
    """Self-attention of ``[batch, frames, features]`` with one of four kinds of positions.

    ``relative_key`` adds learned embeddings of clipped distances (Shaw et al. 2018) to the keys; ``relative`` is that
    of Transformer-XL (Dai et al. 2019); ``rotary`` rotates the states before they are projected to queries and keys;
    ``None`` has no positions.
    """

    config: Wav2Vec2BertConfig
    position_embeddings_type: str | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch frames features"],
        mask: Bool[Array, "batch frames"],
        deterministic: bool,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch frames features"], Float[Array, "batch heads frames frames"] | None]:
        config = self.config
        batch, frames, features = hidden_states.shape
        dense = partial(linear, features, dtype=self.dtype, initializer_range=config.initializer_range)

        def heads(states: Array, name: str) -> Array:
            projected = dense(name=name)(states)
            return projected.reshape(batch, frames, config.num_attention_heads, -1).swapaxes(1, 2)

        located = hidden_states
        if self.position_embeddings_type == "rotary":
            located = rotate(hidden_states, config.num_attention_heads, config.rotary_embedding_base)
        query, key = heads(located, "linear_q"), heads(located, "linear_k")
        value = heads(hidden_states, "linear_v")
        query, position_scores = self._positions(query, features)

        rate = 0.0 if deterministic else config.attention_dropout
        random = self.make_rng("dropout") if rate else None
        attended, probabilities = attend_to_all(
            query, key, value, mask, position_scores, rate=rate, random=random, output_probabilities=output_attentions
        )
        return dense(name="linear_out")(attended), probabilities

    def _positions(self, query: Array, features: int) -> tuple[Array, PositionScores | None]:
        """The query for the content scores, and the function that computes the position scores."""
        config = self.config
        frames, head_size = query.shape[2:]
        if self.position_embeddings_type == "relative_key":
            left, right = config.left_max_position_embeddings, config.right_max_position_embeddings
            table = nn.Embed(
                left + right + 1, head_size, dtype=self.dtype, name="distance_embedding",
                embedding_init=nn.initializers.xavier_uniform(),
            )  # fmt: skip
            distances = table(jnp.arange(left + right + 1))
            return query, lambda block, first: relative_key_scores(block, distances, first, frames, left)
        if self.position_embeddings_type == "relative":
            shape = (config.num_attention_heads, head_size)
            biases = [
                self.param(name, nn.initializers.xavier_uniform(), shape).astype(self.dtype)[:, None]
                for name in ("pos_bias_u", "pos_bias_v")
            ]
            spread = config.initializer_range
            project = linear(features, name="linear_pos", dtype=self.dtype, initializer_range=spread, use_bias=False)
            positions = project(jnp.asarray(relative_sinusoids(frames, features))).reshape(-1, *shape)
            shift = biases[1] - biases[0]  # the block already holds the bias of the content scores
            return query + biases[0], lambda block, first: relative_scores(block + shift, positions, first, frames)
        return query, None
