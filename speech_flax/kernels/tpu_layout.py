"""How attention is cut into pieces for a TPU: what the kernels of both directions share."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.dropout import kept

#: Where a tile of keys lies, as seen from one of queries; ``NEAR`` is in the window, or anywhere without relative keys.
NEAR, LEFT, RIGHT = 0, 1, 2


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Keys:
    """A tile of keys, as a tile of queries sees it.

    Attributes:
      rows: Its place in the block of keys.
      first: Its first frame in that block.
      apart: How many tiles it lies to the right of the queries; ``None`` without relative keys.
      near: The values of ``apart`` at which it belongs to the window, of those that can occur.
    """

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

    def keys(self, query_block: Array, key_block: Array, index: Array) -> list[Keys]:
        """The tiles of a block of keys, for the ``index``-th tile of a block of queries; those of the window last.

        With relative keys the order turns with the queries, so that which tiles can lie in the window is known when
        the kernel is compiled.
        """
        if not self.relative:
            return [Keys(pl.ds(tile * self.tile, self.tile), tile * self.tile, None, ()) for tile in range(self.tiles)]
        keys = []
        for turn in range(self.tiles):
            number = index + turn
            number = jnp.where(number >= self.tiles, number - self.tiles, number)
            apart = (key_block - query_block) * self.tiles + number - index
            first = pl.multiple_of(number * self.tile, self.tile)
            near = tuple(tiles for tiles in self.near if (tiles - turn) % self.tiles == 0)
            keys.append(Keys(pl.ds(first, self.tile), first, apart, near))
        return sorted(keys, key=lambda tile: bool(tile.near))

    def kept(
        self, seeds: list[Array], query_block: Array, index: Array, key_block: Array, keys: Keys
    ) -> Bool[Array, "rows tile"]:
        """Probabilities of a tile of queries and one of keys that dropout keeps; a seed for every head of the group."""
        first_query, first_key = query_block * self.block + index * self.tile, key_block * self.block + keys.first
        queries = first_query + lax.broadcasted_iota(jnp.int32, (self.tile, 1), 0)
        keys = first_key + lax.broadcasted_iota(jnp.int32, (1, self.tile), 1)
        return jnp.concatenate([kept(seed, queries, keys, self.dropout_rate) for seed in seeds])
