"""Multi-head self-attention with the positions of Wav2Vec2-BERT."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Shaped

from speech_flax.configuration import Wav2Vec2BertConfig
from speech_flax.kernels.attention import attend, attend_in_blocks
from speech_flax.kernels.dropout import head_seeds
from speech_flax.kernels.fused_attention import fused_attention
from speech_flax.kernels.positions import Positions, Relative, RelativeKey
from speech_flax.layers.linear import linear
from speech_flax.layers.positions import relative_sinusoids, rotate
from speech_flax.layers.sharding import BATCH_AXES

#: Where no fused formulation serves, longer inputs are attended to in blocks of queries.
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

    All formulations give the numbers of :func:`~speech_flax.kernels.attention.attend`, with scores and softmax in
    float32. The probabilities, and the positions of Transformer-XL, take the definition itself; the rest takes what
    is best for the platform.

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
    probabilities = None
    if output_attentions or isinstance(positions, Relative):
        states = (states.swapaxes(1, 2) for states in (query, key, value))
        if output_attentions or frames <= _LONGEST_WHOLE:
            attended, probabilities = attend(*states, mask, positions, dropout_rate, seeds)
        else:
            attended = attend_in_blocks(*states, mask, positions, dropout_rate, seeds)
        attended = attended.swapaxes(1, 2)
    else:
        attended = over_shards(partial(fused_attention, dropout_rate=dropout_rate), batch, heads)(
            query, key, value, mask, positions, seeds
        )
    return attended.reshape(batch, frames, heads * head_size), probabilities if output_attentions else None


def over_shards(function: Callable[..., States], batch: int, heads: int) -> Callable[..., States]:
    """``function`` run by every device of the mesh on its own rows and heads.

    The partitioner cannot cut a kernel: without this, every device would gather and compute the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return function
    rows = BATCH_AXES if batch % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 else None
    by_head = "tensor" if heads % mesh.shape.get("tensor", heads + 1) == 0 else None
    states, seeds = P(rows, None, by_head), P(rows, by_head)
    return jax.shard_map(
        function, in_specs=(states, states, states, P(rows), P(), seeds), out_specs=states, check_vma=False
    )


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
