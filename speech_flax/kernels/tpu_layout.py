"""How attention is cut into pieces for a TPU: what the kernels of both directions share."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.dropout import kept

#: Where a tile of keys lies, as seen from one of queries; ``NEAR`` is in the window, or anywhere without relative keys.
NEAR, LEFT, RIGHT = 0, 1, 2
#: Tiles of keys that are handled together: matrix units of 256 x 256 take two.
_PAIR = 2


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Keys:
    """A tile of keys, as a tile of queries sees it.

    Attributes:
      number: Which tile of the block of keys it is.
      rows: Its frames in that block.
      first: The first of them.
      apart: How many tiles it lies to the right of the queries; ``None`` without relative keys.
      near: The values of ``apart`` at which it belongs to the window, of those that can occur.
    """

    number: int | Int[Array, ""]
    rows: pl.Slice
    first: int | Int[Array, ""]
    apart: Int[Array, ""] | None
    near: tuple[int, ...]

    @property
    def side(self) -> Int[Array, ""]:
        """``LEFT`` or ``RIGHT``, of a tile outside the window."""
        return jnp.where(self.apart < 0, LEFT, RIGHT)

    @property
    def place(self) -> int | Int[Array, ""]:
        """``NEAR``, ``LEFT`` or ``RIGHT``."""
        if self.apart is None:
            return NEAR
        place = self.side
        for apart in self.near:
            place = jnp.where(self.apart == apart, NEAR, place)
        return place


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the pieces.

    A program handles one block of queries and one block of keys for as many heads as share ``tile`` lanes. Within it,
    a loop handles ``tile`` queries at a time, of these heads one under the other, and all keys, tile by tile. Keys
    whose distance to any of the queries is not clipped lie in a window that starts ``before`` the first query; keys to
    its left all get the score of the leftmost distance, keys to its right that of the rightmost.

    Attributes:
      tile: Lanes of a register, and queries handled at a time.
      frames: Of the input; the last block may reach beyond them.
      group: Heads that share a register: each has ``tile / group`` lanes, zeros behind its head size.
      block: Queries, and keys, of a program.
      blocks: Number of blocks.
      left: Largest distance to the left that has its own embedding; ``None`` without relative keys.
      right: Largest distance to the right.
      dropout_rate: Share of probabilities that are dropped.
    """

    tile: int
    frames: int
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
    def near(self) -> range:
        """How many tiles to the right of the queries the tiles of their window lie."""
        return range(-self.before // self.tile, (self.window - self.before) // self.tile)

    @property
    def last(self) -> int:
        """The row of the rightmost distance in the table of embeddings."""
        return (self.left or 0) + self.right

    @property
    def table(self) -> int:
        """Rows of the table of embeddings; those behind the rightmost distance repeat it."""
        return round_up(self.last + 1, self.tile)

    @property
    def lanes(self) -> int:
        """Lanes of each head."""
        return self.tile // self.group

    @property
    def tiles(self) -> int:
        return self.block // self.tile

    @property
    def pairs(self) -> int:
        """Pairs of tiles, of which the last may be a single one."""
        return -(-self.tiles // _PAIR)

    @property
    def pair(self) -> int:
        """Keys of a pair of tiles."""
        return _PAIR * self.tile

    @property
    def rows(self) -> int:
        """Rows of a tile of queries of all heads of a group."""
        return self.group * self.tile

    @property
    def padded(self) -> int:
        """Frames of all blocks."""
        return self.blocks * self.block

    def clear(self, number: Array, *refs: Any) -> None:
        """Make zeros of what blocks ``[1, block, lanes]`` hold behind the last frame, if they are the last ones."""
        here = self.frames - (self.blocks - 1) * self.block
        if here == self.block:
            return

        @pl.when(number == self.blocks - 1)
        def _():
            for first in range(here // self.tile * self.tile, self.block, self.tile):
                rows = slice(first, first + self.tile)
                inside = first + lax.broadcasted_iota(jnp.int32, (self.tile, 1), 0) < here
                for ref in refs:
                    ref[0, rows] = jnp.where(inside, ref[0, rows], 0)

    def stack(self, states: Float[Array, "tile lanes"]) -> Float[Array, "rows lanes"]:
        """The heads of a group one under the other, each with zeros in the lanes of the others."""
        if self.group == 1:
            return states
        zeros = jnp.zeros_like(states)
        return jnp.concatenate([self._merge(zeros, states, head) for head in range(self.group)])

    def unstack(self, stacked: Float[Array, "rows lanes"]) -> Float[Array, "tile lanes"]:
        """The heads of a group side by side, each from its own rows."""
        states, *others = self.heads(stacked)
        for head, other in enumerate(others, 1):
            states = self._merge(states, other, head)
        return states

    def _merge(self, old: Float[Array, "tile lanes"], new: Float[Array, "tile lanes"], head: int) -> Array:
        """``new`` in the lanes of one head, ``old`` in the others."""
        lane = lax.broadcasted_iota(jnp.int32, new.shape, 1)
        return jnp.where((lane >= head * self.lanes) & (lane < (head + 1) * self.lanes), new, old)

    def heads(self, stacked: Float[Array, "rows columns"]) -> list[Float[Array, "tile columns"]]:
        """The rows of every head of a group."""
        return [stacked[head * self.tile : (head + 1) * self.tile] for head in range(self.group)]

    def queries(self, index: int | Int[Array, ""]) -> pl.Slice:
        """The frames that the ``index``-th tile of a block has."""
        return pl.ds(pl.multiple_of(index * self.tile, self.tile), self.tile)

    def keys(self, query_block: Array, key_block: Array, index: int | Int[Array, ""]) -> list[list[Keys]]:
        """The tiles of a block of keys, for the ``index``-th tile of a block of queries, in pairs; those of the window
        first.

        With relative keys the order turns with the queries, so that which tiles can lie in the window is known when
        the kernel is compiled.
        """
        tiles = [self._keys(query_block, key_block, index, turn) for turn in range(self.tiles)]
        tiles.sort(key=lambda keys: not keys.near)
        return [tiles[first : first + _PAIR] for first in range(0, self.tiles, _PAIR)]

    def _keys(self, query_block: Array, key_block: Array, index: int | Int[Array, ""], turn: int) -> Keys:
        if not self.relative:
            return Keys(turn, pl.ds(turn * self.tile, self.tile), turn * self.tile, None, ())
        number = index + turn
        number = jnp.where(number >= self.tiles, number - self.tiles, number)
        first = pl.multiple_of(number * self.tile, self.tile)
        near = tuple(tiles for tiles in self.near if (tiles - turn) % self.tiles == 0)
        apart = (key_block - query_block) * self.tiles + number - index
        return Keys(number, pl.ds(first, self.tile), first, apart, near)

    def kept(
        self, seeds: list[Array], query_block: Array, index: int | Array, key_block: Array, pair: list[Keys]
    ) -> Bool[Array, "rows keys"]:
        """Probabilities of a tile of queries and a pair of keys that dropout keeps; a seed for every head."""
        first_query = query_block * self.block + index * self.tile
        queries = first_query + lax.broadcasted_iota(jnp.int32, (self.tile, 1), 0)
        lane = lax.broadcasted_iota(jnp.int32, (1, self.tile), 1)
        keys = jnp.concatenate([key_block * self.block + keys.first + lane for keys in pair], axis=1)
        return jnp.concatenate([kept(seed, queries, keys, self.dropout_rate) for seed in seeds])

    def as_rows(self, column: Float[Array, "rows 1"]) -> Float[Array, "group tile"]:
        """A row for each head, without a transposition."""
        row, lane = (lax.broadcasted_iota(jnp.int32, (self.tile, self.tile), axis) for axis in (0, 1))
        of_heads = self.heads(column)
        return jnp.concatenate([jnp.where(row == lane, of_head, 0).sum(0, keepdims=True) for of_head in of_heads])

    def as_column(self, values: Float[Array, "group tile"]) -> Float[Array, "rows 1"]:
        """The rows of all heads under one another."""
        row, lane = (lax.broadcasted_iota(jnp.int32, (self.tile, self.tile), axis) for axis in (0, 1))
        of_heads = (values[head : head + 1] for head in range(self.group))
        return jnp.concatenate([jnp.where(row == lane, of_head, 0).sum(1, keepdims=True) for of_head in of_heads])

    def when(self, condition: Array) -> Callable[[Callable[[], None]], None]:
        """Decorator of what is done if a block is one of some of the blocks: always, if there is but one.

        The compiler reorders instructions between branches only.
        """
        return pl.when(condition) if self.blocks > 1 else lambda done: done()


def seeds_of_heads(layout: Layout, seeds: Any) -> list[Array]:
    """The seeds of dropout of the heads of this program, from those of all rows and heads."""
    row, group = pl.program_id(0), pl.program_id(1)
    return [seeds[row, group * layout.group + head] for head in range(layout.group)] if layout.dropout_rate else []


def together(arrays: Iterable[Any]) -> Array:
    """The tiles of a pair under one another."""
    return jnp.concatenate(list(arrays))
