"""How attention is cut into pieces for a TPU: what the kernels of both directions share."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.dropout import kept
from speech_flax.kernels.products import OF_ROWS, multiply


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the pieces.

    A program handles one block of queries and one block of keys for as many heads as share ``tile`` lanes. Within it,
    a loop handles ``tile`` queries at a time. Keys whose distance to any of these is not clipped lie in a window that
    starts ``before`` the first query; keys to its left all get the score of the leftmost distance, keys to its right
    that of the rightmost.

    Attributes:
      tile: Lanes of a register, and queries handled at a time.
      group: Heads that share a register: each has ``tile / group`` lanes, zeros behind its head size.
      block: Queries, and keys, of a program.
      blocks: Number of blocks.
      left: Largest distance to the left that has its own embedding; ``None`` without relative keys.
      right: Largest distance to the right.
      dropout_rate: Share of probabilities that are dropped.
    """

    tile: int
    group: int
    block: int
    blocks: int
    left: int | None
    right: int
    dropout_rate: float

    @property
    def relative(self) -> bool:
        return self.left is not None

    @property
    def before(self) -> int:
        return round_up(self.left or 0, self.tile)

    @property
    def window(self) -> int:
        return self.before + self.tile + round_up(max(self.right, 1), self.tile)

    @property
    def table(self) -> int:
        """Rows of the table of embeddings; those behind the rightmost distance repeat it."""
        return round_up((self.left or 0) + self.right + 1, self.tile)

    @property
    def margin(self) -> int:
        """Columns on both sides of a block of scores, so that a window can be written that is partly outside."""
        return self.window if self.relative else 0

    @property
    def columns(self) -> int:
        return self.block + 2 * self.margin

    @property
    def lanes(self) -> int:
        """Lanes of each head."""
        return self.tile // self.group

    @property
    def tiles(self) -> int:
        return self.block // self.tile

    def of_head(self, states: Float[Array, "rows tile"], head: int) -> Float[Array, "rows tile"]:
        """States of one head of a group: zeros in the lanes of the others."""
        return self.merge(jnp.zeros_like(states), states, head)

    def merge(self, old: Float[Array, "rows tile"], new: Float[Array, "rows tile"], head: int) -> Array:
        """``new`` in the lanes of one head of a group, ``old`` in the others."""
        if self.group == 1:
            return new
        lane = lax.broadcasted_iota(jnp.int32, new.shape, 1)
        return jnp.where((lane >= head * self.lanes) & (lane < (head + 1) * self.lanes), new, old)

    def side(self, first_query: Array, first_key: Array) -> Array:
        """Where a tile of keys lies: 0 left of the window, 1 in it, 2 right of it."""
        start = first_query - self.before
        return jnp.where(first_key < start, 0, jnp.where(first_key >= start + self.window, 2, 1))

    def window_start(self, first_query: Array, first_key: Array) -> tuple[Array, Array]:
        """Column of the window in a block of scores with margins, and whether it touches the block."""
        start = first_query - self.before - first_key
        touches = (start > -self.window) & (start < self.block)
        return pl.multiple_of(jnp.clip(start + self.margin, 0, self.columns - self.window), self.tile), touches

    def kept(self, seed: Array, first_query: Array, first_key: Array) -> Bool[Array, "tile block"]:
        """Probabilities of a tile of queries that dropout keeps."""
        queries = first_query + lax.broadcasted_iota(jnp.int32, (self.tile, 1), 0)
        keys = first_key + lax.broadcasted_iota(jnp.int32, (1, self.block), 1)
        return kept(seed, queries, keys, self.dropout_rate)


def scores(
    layout: Layout,
    query: Float[Array, "tile lanes"],
    key: Float[Array, "block lanes"],
    table: Float[Array, "table lanes"] | None,
    mask: Float[Array, "1 block"],
    first_query: Int[Array, ""],
    first_key: Int[Array, ""],
    scores_ref,
    sides_ref,
) -> Float[Array, "tile block"]:
    """Scores of a tile of queries; ``scores_ref`` and ``sides_ref`` are scratch memory of the relative term."""
    content = multiply(query, key, OF_ROWS)
    if not layout.relative:
        return content + mask
    tile, margin = layout.tile, layout.margin
    near = multiply(query, table, OF_ROWS)
    last = layout.left + layout.right
    far_left, far_right = near[:, :1], near[:, last : last + 1]
    sides_ref[0] = jnp.broadcast_to(far_left, (tile, tile))
    sides_ref[1] = jnp.zeros((tile, tile), jnp.float32)
    sides_ref[2] = jnp.broadcast_to(far_right, (tile, tile))
    for start in range(0, layout.block, tile):
        side = sides_ref[layout.side(first_query, first_key + start)]
        scores_ref[:, margin + start : margin + start + tile] = content[:, start : start + tile] + side
    column, touches = layout.window_start(first_query, first_key)

    @pl.when(touches)
    def _():
        scores_ref[:, pl.ds(column, layout.window)] += _skew(layout, near, far_left, far_right)

    return scores_ref[:, margin : margin + layout.block] + mask


def _skew(layout: Layout, near: Array, far_left: Array, far_right: Array) -> Float[Array, "tile window"]:
    """Scores by key of the window from scores by distance: each row moves one column further than the row above."""
    tile, window = layout.tile, layout.window
    behind = jnp.broadcast_to(far_right, (tile, window - layout.table))
    by_distance = jnp.concatenate([near, behind], axis=1) if window > layout.table else near
    by_key = pltpu.roll(by_distance, layout.before - layout.left, 1, stride=1, stride_axis=0)
    return jnp.where(_wrapped(layout, reverse=False), far_left, by_key)


def _wrapped(layout: Layout, reverse: bool) -> Bool[Array, "tile window"]:
    """Columns of the window left of the leftmost distance: of the skewed one, or of one unskewed with rows reversed."""
    shape = (layout.tile, layout.window)
    row, column = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
    shift = layout.before - layout.left
    if reverse:
        return column >= layout.window - (layout.tile - 1 - row) - shift
    return column < row + shift


def reversal(size: int, dtype: jnp.dtype) -> Float[Array, "size size"]:
    """The matrix that reverses the order of rows."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(row + column == size - 1, 1, 0).astype(dtype)


def unskew(layout: Layout, by_key: Float[Array, "tile window"]) -> Float[Array, "tile table"]:
    """Transpose of the skew: gradients by distance, rows reversed, from those by key.

    The hardware moves rows to the right only: reversed rows make of the needed move to the left one to the right.
    """
    tile, window = layout.tile, layout.window
    reversed_rows = multiply(reversal(tile, by_key.dtype), by_key)
    # Row p moves left by p + shift: the reversed row r = tile - 1 - p moves right by r - (tile - 1) - shift.
    right = (-(tile - 1) - (layout.before - layout.left)) % window
    moved = pltpu.roll(reversed_rows, right, 1, stride=1, stride_axis=0)
    wrapped = _wrapped(layout, reverse=True)
    far_left = jnp.where(wrapped, moved, 0).sum(1, keepdims=True)
    moved = jnp.where(wrapped, 0, moved)
    near, last = moved[:, : layout.table], layout.left + layout.right
    lane = lax.broadcasted_iota(jnp.int32, near.shape, 1)
    near += jnp.where(lane == 0, far_left, 0)
    if window > layout.table:
        near += jnp.where(lane == last, moved[:, layout.table :].sum(1, keepdims=True), 0)
    return near
