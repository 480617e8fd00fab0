"""Scores of relative keys (Shaw et al. 2018) for a tile of queries on a TPU: from distances to keys, and back.

A query has one score for each row of the table of embeddings, a small product. Under the keys of the window each row of
these scores moves one column further than the row above: a strided roll, which the hardware has for moves to the right.
The way back is a move to the left, which becomes one to the right when the order of the keys is reversed.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from speech_flax.kernels.products import OF_ROWS, multiply
from speech_flax.kernels.tpu_layout import LEFT, RIGHT, Keys, Layout


class RelativeScores:
    """What is added to the scores of content of a tile of queries.

    Args:
      query: The queries, heads stacked.
      table: The embeddings.
      sides_ref: Scratch memory for the scores of keys on both sides of the window.
      shift: Subtracted from all scores of a query.
    """

    def __init__(
        self,
        layout: Layout,
        query: Float[Array, "rows lanes"],
        table: Float[Array, "table lanes"],
        sides_ref,
        shift: Float[Array, "rows 1"] | None = None,
    ) -> None:
        by_distance = multiply(query, table, OF_ROWS)
        if shift is not None:
            by_distance -= shift
        shape = (layout.rows, layout.tile)
        sides_ref[LEFT] = jnp.broadcast_to(by_distance[:, :1], shape)
        sides_ref[RIGHT] = jnp.broadcast_to(by_distance[:, layout.last : layout.last + 1], shape)
        by_key = jnp.concatenate([_skew(layout, of_head) for of_head in layout.heads(by_distance)])
        columns = enumerate(layout.near)
        self._near = {apart: by_key[:, tile * layout.tile : (tile + 1) * layout.tile] for tile, apart in columns}
        self._sides_ref = sides_ref

    def of(self, keys: Keys) -> Float[Array, "rows tile"]:
        """The scores of a tile of keys."""
        added = self._sides_ref[keys.side]
        for apart in keys.near:
            added = jnp.where(keys.apart == apart, self._near[apart], added)
        return added


def _skew(layout: Layout, by_distance: Float[Array, "tile table"]) -> Float[Array, "tile window"]:
    """Scores by key of the window from scores by row of the table, of one head."""
    far_left, far_right = by_distance[:, :1], by_distance[:, layout.last : layout.last + 1]
    behind = layout.window - layout.table
    if behind > 0:
        by_distance = jnp.concatenate([by_distance, jnp.broadcast_to(far_right, (layout.tile, behind))], axis=1)
    shift = layout.before - layout.left
    by_key = pltpu.roll(by_distance, shift, 1, stride=1, stride_axis=0)
    row, column = (lax.broadcasted_iota(jnp.int32, by_key.shape, axis) for axis in (0, 1))
    return jnp.where(column < row + shift, far_left, by_key)


def gradient_by_distance(layout: Layout, d_scores: list[Float[Array, "rows tile"]]) -> Float[Array, "rows table"]:
    """Gradients by row of the table, in reversed order, from those of the scores of the window's keys, tile by tile."""
    size, dtype = layout.tile, d_scores[0].dtype
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    reversal = jnp.where(row + column == size - 1, 1, 0).astype(dtype)
    by_key = [multiply(of_tile, reversal) for of_tile in reversed(d_scores)]
    of_heads = layout.heads(jnp.concatenate(by_key, axis=1))
    return jnp.concatenate([_unskew(layout, of_head) for of_head in of_heads]).astype(dtype)


def _unskew(layout: Layout, reversed_keys: Float[Array, "tile window"]) -> Float[Array, "tile table"]:
    """The transpose of :func:`_skew` for keys from right to left; the rightmost distance comes first."""
    last = layout.last
    shift = layout.before + layout.right + 1
    moved = pltpu.roll(reversed_keys, shift % layout.window, 1, stride=1, stride_axis=0)
    row, column = (lax.broadcasted_iota(jnp.int32, moved.shape, axis) for axis in (0, 1))
    far = jnp.where(column > last, moved, 0)
    is_left = column < row + shift
    far_left = jnp.where(is_left, far, 0).sum(1, keepdims=True)
    far_right = jnp.where(is_left, 0, far).sum(1, keepdims=True)
    near = jnp.where(column <= last, moved, 0)[:, : layout.table]
    column = column[:, : layout.table]
    return near + jnp.where(column == last, far_left, 0) + jnp.where(column == 0, far_right, 0)
