"""Attention on TPUs without a tensor of queries and keys: states to the kernels' layout and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels import tpu_attention
from speech_flax.kernels.attention import MASKED
from speech_flax.kernels.tpu_layout import Layout, round_up

States = Float[Array, "batch frames heads head_size"]


@dataclasses.dataclass(frozen=True)
class FlashAttention:
    """Forward and backward pass of attention: a :class:`~speech_flax.kernels.fused_attention.Formulation`.

    Attributes:
      left: Largest distance to the left with an embedding of its own; ``None`` without relative keys.
      dropout_rate: Share of the probabilities that are dropped.
      tile: Lanes of a register.
      longest_block: Most frames of a block; longer inputs are cut into blocks.
      longest_input: Most frames of an input.
      interpret: Run without a TPU, slowly.
    """

    left: int | None
    dropout_rate: float
    tile: int = 128
    longest_block: int = 1536
    longest_input: int = 32768
    interpret: bool = False

    def forward(
        self,
        query: States,
        key: States,
        value: States,
        mask: Bool[Array, "batch frames"],
        embeddings: Float[Array, "distances head_size"] | None,
        seeds: Int[Array, "batch heads"],
    ) -> tuple[States, Float[Array, "batch heads frames"]]:
        """Attended values, and logarithms of the sums of exponentiated scores."""
        layout, operands = self._operands(query, key, value, mask, embeddings, seeds)
        attended, logsumexp = tpu_attention.forward(layout, *operands, self.interpret)
        return self._unpack(layout, attended, query), self._unpack_rows(logsumexp, query)

    def backward(
        self,
        query: States,
        key: States,
        value: States,
        mask: Bool[Array, "batch frames"],
        embeddings: Float[Array, "distances head_size"] | None,
        seeds: Int[Array, "batch heads"],
        attended: States,
        logsumexp: Float[Array, "batch heads frames"],
        cotangent: States,
    ) -> tuple[States, States, States, Float[Array, "distances head_size"] | None]:
        """Gradients of queries, keys, values and embeddings."""
        layout, (*operands, table, seeds, lengths) = self._operands(query, key, value, mask, embeddings, seeds)
        reversed_rows = np.maximum(layout.last - np.arange(layout.table), 0)
        operands += [table, table[reversed_rows] if layout.relative else table, seeds, lengths]
        rows = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, layout.padded - layout.frames)))
        rows = rows.reshape(query.shape[0], -1, layout.group, layout.padded)
        packed = (self._pack(layout, attended), rows, self._pack(layout, cotangent))
        d_query, d_key, d_value, d_table = tpu_attention.backward(layout, *operands, *packed, self.interpret)
        d_query, d_key, d_value = (self._unpack(layout, states, query) for states in (d_query, d_key, d_value))
        if embeddings is not None:
            by_row = d_table.sum((0, 1)).reshape(-1, layout.group, layout.lanes).sum(1)[:, : query.shape[-1]]
            row_of = self._rows_of_table(layout, embeddings.shape[0])[reversed_rows]
            embeddings = jax.ops.segment_sum(by_row, row_of, embeddings.shape[0]).astype(embeddings.dtype)
        return d_query, d_key, d_value, embeddings

    def suits(self, frames: int, head_size: int) -> bool:
        """Whether heads fit a register, and the gradient of all queries of a head fits the memory next to the cores."""
        return head_size <= self.tile and frames <= self.longest_input

    def _operands(self, query, key, value, mask, embeddings, seeds) -> tuple[Layout, tuple[Array, ...]]:
        _, frames, heads, head_size = query.shape
        layout = self._layout(frames, heads, head_size, embeddings)
        lengths = jnp.where(mask, jnp.arange(1, frames + 1), 0).max(-1).astype(jnp.int32)
        outside = ((0, 0), (0, layout.padded - frames))
        added = jnp.pad(jnp.where(mask, 0.0, MASKED), outside, constant_values=MASKED)[:, None]
        table = jnp.zeros((layout.tile, layout.tile), query.dtype)
        if embeddings is not None:
            used = embeddings[self._rows_of_table(layout, embeddings.shape[0])]
            used = jnp.pad(used, ((0, 0), (0, layout.lanes - head_size)))
            table = jnp.tile(used, (1, layout.group)).astype(query.dtype)
        states = (self._pack(layout, states) for states in (query, key, value))
        return layout, (*states, added.astype(jnp.float32), table, seeds, lengths)

    def _layout(self, frames: int, heads: int, head_size: int, embeddings: Array | None) -> Layout:
        group = 2 if heads % 2 == 0 and 2 * head_size <= self.tile else 1
        blocks = -(-frames // self.longest_block)
        block = round_up(-(-frames // blocks), self.tile)
        left, right = None, 0
        if embeddings is not None:  # distances that do not occur need no place
            left, right = (min(reach, frames - 1) for reach in (self.left, embeddings.shape[0] - 1 - self.left))
            left = round_up(left, 8)  # rows of a register, which are rolled together
        return Layout(self.tile, frames, group, block, blocks, left, right, self.dropout_rate)

    def _rows_of_table(self, layout: Layout, distances: int) -> Int[np.ndarray, "table"]:
        """The embedding in every row of the kernels' table: those at its ends repeat the leftmost and rightmost."""
        return np.clip(np.arange(layout.table) + self.left - layout.left, 0, distances - 1)

    def _pack(self, layout: Layout, states: States) -> Float[Array, "batch frames lanes"]:
        """Heads side by side. Frames are not padded, which would copy them: the kernels clear what lies behind."""
        batch, frames, heads, head_size = states.shape
        if layout.lanes > head_size:
            states = jnp.pad(states, ((0, 0), (0, 0), (0, 0), (0, layout.lanes - head_size)))
        return states.reshape(batch, frames, heads * layout.lanes)

    def _unpack(self, layout: Layout, packed: Array, like: States) -> States:
        batch, frames, heads, head_size = like.shape
        return packed.reshape(batch, frames, heads, layout.lanes)[..., :head_size]

    def _unpack_rows(self, rows: Array, like: States) -> Float[Array, "batch heads frames"]:
        batch, frames, heads, _ = like.shape
        return rows.reshape(batch, heads, -1)[:, :, :frames]
