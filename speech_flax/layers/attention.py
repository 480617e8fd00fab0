"""Multi-head self-attention with the positions of Wav2Vec2-BERT."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Shaped

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.kernels.attention import attend, attend_in_blocks
from speech_flax.kernels.dropout import head_seeds
from speech_flax.kernels.positions import Positions, Relative, RelativeKey
from speech_flax.layers.feed_forward import linear
from speech_flax.layers.positions import relative_sinusoids, rotate

#: Longer inputs are attended to in blocks of queries.
_LONGEST_WHOLE = 1024

States = Float[Array, "batch frames heads head_size"]


def attention(
    query: States,
    key: States,
    value: States,
    mask: Bool[Array, "batch frames"],
    *,
    positions: Positions = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | Shaped[Array, "2"] | None = None,
    output_attentions: bool = False,
) -> tuple[Float[Array, "batch frames features"], Float[Array, "batch heads frames frames"] | None]:
    """Attention of every frame to the frames that count, scaled by the root of the head size.

    Every formulation gives the numbers of :func:`~speech_flax.kernels.attention.attend`, with scores and softmax in
    float32.

    Args:
      query: Unscaled queries.
      mask: ``True`` for frames that count, as keys. Where none does, all get the same probability.
      positions: Scores added for the distance between key and query.
      dropout_rate: Share of the probabilities that are dropped; 0 needs no ``dropout_key``.
      dropout_key: Decides which; the same key drops the same ones whatever the formulation.
      output_attentions: Return the probabilities, after dropout.

    Returns:
      The attended values, heads side by side; and the probabilities, or ``None`` if they are not asked for.
    """
    batch, frames, heads, head_size = query.shape
    seeds = head_seeds(dropout_key, batch, heads) if dropout_rate else None
    query, key, value = (states.swapaxes(1, 2) for states in (query, key, value))
    probabilities = None
    if output_attentions or frames <= _LONGEST_WHOLE:
        attended, probabilities = attend(query, key, value, mask, positions, dropout_rate, seeds)
    else:
        attended = attend_in_blocks(query, key, value, mask, positions, dropout_rate, seeds)
    attended = attended.swapaxes(1, 2).reshape(batch, frames, heads * head_size)
    return attended, probabilities if output_attentions else None


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
            return dense(name=name)(states).reshape(batch, frames, config.num_attention_heads, -1)

        located = hidden_states
        if self.position_embeddings_type == "rotary":
            located = rotate(hidden_states, config.num_attention_heads, config.rotary_embedding_base)
        query, key = heads(located, "linear_q"), heads(located, "linear_k")
        value = heads(hidden_states, "linear_v")
        rate = 0.0 if deterministic else config.attention_dropout
        attended, probabilities = attention(
            query,
            key,
            value,
            mask,
            positions=self._positions(frames, features),
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            output_attentions=output_attentions,
        )
        return dense(name="linear_out")(attended), probabilities

    def _positions(self, frames: int, features: int) -> Positions:
        config = self.config
        heads, head_size = config.num_attention_heads, features // config.num_attention_heads
        if self.position_embeddings_type == "relative_key":
            left, right = config.left_max_position_embeddings, config.right_max_position_embeddings
            table = nn.Embed(
                left + right + 1, head_size, dtype=self.dtype, name="distance_embedding",
                embedding_init=nn.initializers.xavier_uniform(),
            )  # fmt: skip
            return RelativeKey(table(jnp.arange(left + right + 1)), left)
        if self.position_embeddings_type == "relative":
            biases = [
                self.param(name, nn.initializers.xavier_uniform(), (heads, head_size)).astype(self.dtype)
                for name in ("pos_bias_u", "pos_bias_v")
            ]
            spread = config.initializer_range
            project = linear(features, name="linear_pos", dtype=self.dtype, initializer_range=spread, use_bias=False)
            sinusoids = jnp.asarray(relative_sinusoids(frames, features))
            return Relative(project(sinusoids).reshape(-1, heads, head_size), *biases)
        return None
