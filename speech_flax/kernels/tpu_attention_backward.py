"""The backward pass of the attention kernel for TPUs (Dao et al. 2022, algorithm 4), with that of relative keys.

A tile of queries goes through three stages, which are written next to each other for three tiles that follow: scores
and gradients of probabilities are computed for the next tile, gradients of scores, keys and values for this one, and
those of distances for the one before. In each stage pairs of keys take turns.

Sums for keys and values lie transposed, keys along the lanes, so that probabilities and gradients of scores need not be
transposed for every tile of queries.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from speech_flax.kernels.products import OF_COLUMNS, OF_ROWS, multiply
from speech_flax.kernels.stages import interleave, prepared
from speech_flax.kernels.tpu_layout import (
    LEFT,
    NEAR,
    RIGHT,
    Keys,
    Layout,
    seeds_of_heads,
    together,
)
from speech_flax.kernels.tpu_relative_key import RelativeScores, gradient_by_distance


class BackwardMemory(NamedTuple):
    """What a program reads, writes and keeps.

    Attributes:
      seeds: Of dropout ``[batch, heads]``.
      lengths: Frames of each row.
      query: ``[1, block, tile]``, as are ``key``, ``value``, ``attended``, ``cotangent`` and the gradients.
      key: Of a block of keys.
      value: Of a block of keys.
      mask: Added to the scores of a block of keys ``[1, 1, block]``.
      table: Embeddings of distances ``[table, tile]``.
      reversed_table: The same from the rightmost to the leftmost.
      attended: Output of the forward pass.
      logsumexp: Of the forward pass ``[1, 1, group, block]``.
      cotangent: Of ``attended``.
      d_query: Gradient.
      d_key: Gradient.
      d_value: Gradient.
      d_table: Gradient of the reversed table ``[1, 1, table, tile]``.
      scores: Logarithms of probabilities of the next tile of queries, for all pairs of keys ``[pairs, rows, pair]``.
      d_weights: Gradients of probabilities that dropout keeps, less ``products`` ``[pairs, rows, pair]``.
      products: Of attended values and cotangents, summed ``[rows, 1]``; used with dropout.
      window: Gradients of scores of the last tile of queries, for the tiles of keys of the window.
      sides: Of :class:`~speech_flax.kernels.tpu_relative_key.RelativeScores`.
      placed_keys: The keys as queries see them in each place ``[places, block, tile]``.
      query_sum: Gradients of all queries ``[padded, tile]``.
      key_sum: Gradients of keys in each place, transposed ``[places, tiles, tile, tile]``.
      value_sum: Gradients of values, transposed ``[tiles, tile, tile]``.
      table_sum: As ``d_table``.
    """

    seeds: Any
    lengths: Any
    query: Any
    key: Any
    value: Any
    mask: Any
    table: Any
    reversed_table: Any
    attended: Any
    logsumexp: Any
    cotangent: Any
    d_query: Any
    d_key: Any
    d_value: Any
    d_table: Any
    scores: Any
    d_weights: Any
    products: Any
    window: Any
    sides: Any
    placed_keys: Any
    query_sum: Any
    key_sum: Any
    value_sum: Any
    table_sum: Any


class _Backward:
    """One program: the queries of a block, tile by tile, and a block of keys."""

    def __init__(self, layout: Layout, memory: BackwardMemory) -> None:
        self.layout, self.memory = layout, memory
        self.row, self.block, self.queries = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        self.seeds = seeds_of_heads(layout, memory.seeds)

    def run(self) -> None:
        layout, memory = self.layout, self.memory
        layout.clear(self.block, memory.key, memory.value)
        layout.clear(self.queries, memory.query, memory.attended, memory.cotangent)
        first_queries, last_queries = self.queries == 0, self.queries == layout.blocks - 1
        layout.when(first_queries & (self.block == 0))(self.start)
        layout.when(first_queries)(self.start_keys)
        layout.when(self.block * layout.block < memory.lengths[self.row])(self.add_queries)
        layout.when(self.block == layout.blocks - 1)(self.write_queries)
        layout.when(last_queries)(self.write_keys)
        layout.when(last_queries & (self.block == layout.blocks - 1))(self.write_table)

    def start(self) -> None:
        self.memory.table_sum[...] = jnp.zeros_like(self.memory.table_sum)

    def start_keys(self) -> None:
        layout, memory = self.layout, self.memory
        memory.key_sum[...] = jnp.zeros_like(memory.key_sum)
        memory.value_sum[...] = jnp.zeros_like(memory.value_sum)
        memory.placed_keys[NEAR] = memory.key[0]
        if layout.relative:  # outside the window a key always comes together with the embedding of its side
            memory.placed_keys[LEFT] = memory.key[0] + memory.table[:1]
            memory.placed_keys[RIGHT] = memory.key[0] + memory.table[layout.last : layout.last + 1]

    def add_queries(self) -> None:
        """Adds to all sums what the queries of the block contribute."""
        interleave((0, self.score(0)))
        self.memory.window[...] = jnp.zeros_like(self.memory.window)
        last = self.layout.tiles - 1
        lax.fori_loop(0, last, lambda index, _: self.step(index, index + 1), None)
        self.step(last, None)
        interleave((0, self.finish(last)))

    def step(self, index: int | Int[Array, ""], following: Int[Array, ""] | None) -> None:
        """Handles a tile of queries, next to the scores of the following one and the distances of the one before."""
        pairs = self.layout.keys(self.queries, self.block, index)
        dropped, d_scores = [], []
        distribute = self.distribute(index, pairs, dropped, d_scores)
        score_next = iter(()) if following is None else self.score(following)
        interleave(
            (1, self.finish(jnp.maximum(index - 1, 0))),  # adds nothing before the first tile: the window is zero
            (0, self.weigh(index, pairs, dropped, d_scores)),
            (2 if self.layout.relative else 1, score_next),  # the term of relative keys takes a while
            (1, distribute),
        )

    @prepared
    def score(self, index: int | Int[Array, ""]) -> Iterator[None]:
        """Computes logarithms of probabilities, and gradients of probabilities."""
        layout, memory = self.layout, self.memory
        rows = layout.queries(index)
        query, d_attended = layout.stack(memory.query[0, rows]), self._d_attended(rows)
        logsumexp = layout.as_column(memory.logsumexp[0, 0, :, rows])
        attended, cotangent = (array[0, rows].astype(jnp.float32) for array in (memory.attended, memory.cotangent))
        products = layout.stack(attended * cotangent).sum(1, keepdims=True)
        added = None
        if layout.relative:
            added = RelativeScores(layout, query, memory.table[...], memory.sides, logsumexp)
        yield
        if layout.dropout_rate:
            memory.products[...] = products
        for number, pair in enumerate(layout.keys(self.queries, self.block, index)):
            width = len(pair) * layout.tile
            shift = [memory.mask[0, :, keys.rows] + (-logsumexp if added is None else added.of(keys)) for keys in pair]
            score = multiply(query, together(memory.key[0, keys.rows] for keys in pair), OF_ROWS)
            memory.scores[number, :, :width] = score + jnp.concatenate(shift, axis=1)
            values = together(memory.value[0, keys.rows] for keys in pair)
            memory.d_weights[number, :, :width] = multiply(d_attended, values, OF_ROWS) - products
            yield

    def weigh(
        self, index: int | Int[Array, ""], pairs: list[list[Keys]], dropped: list[Array], d_scores: list[Array]
    ) -> Iterator[None]:
        """Appends probabilities after dropout, and gradients of scores."""
        layout, memory = self.layout, self.memory
        if layout.dropout_rate:
            of_dropped = -memory.products[...]
        for number, pair in enumerate(pairs):
            width = len(pair) * layout.tile
            weights, d_weights = jnp.exp(memory.scores[number, :, :width]), memory.d_weights[number, :, :width]
            kept_weights = weights
            if layout.dropout_rate:
                kept = layout.kept(self.seeds, self.queries, index, self.block, pair)
                kept_weights, d_weights = jnp.where(kept, weights, 0), jnp.where(kept, d_weights, of_dropped)
            d_scores.append((weights * d_weights).astype(memory.query.dtype))
            dropped.append(kept_weights.astype(memory.query.dtype))
            yield

    @prepared
    def distribute(
        self, index: int | Int[Array, ""], pairs: list[list[Keys]], dropped: list[Array], d_scores: list[Array]
    ) -> Iterator[None]:
        """Adds to the gradients of keys, values and queries; keeps the gradients of scores of the window."""
        layout, memory = self.layout, self.memory
        rows = layout.queries(index)
        query, d_attended = (
            array.astype(jnp.float32).T.astype(array.dtype)
            for array in (layout.stack(memory.query[0, rows]), self._d_attended(rows))
        )
        d_query = jnp.zeros((layout.rows, layout.tile), jnp.float32)
        yield
        for pair, weights, d_score in zip(pairs, dropped, d_scores, strict=True):
            self._add(memory.key_sum, [(keys.place, keys.number) for keys in pair], multiply(query, d_score))
            self._add(memory.value_sum, [keys.number for keys in pair], multiply(d_attended, weights))
            d_query += multiply(d_score, together(memory.placed_keys[keys.place, keys.rows] for keys in pair))
            self._keep_window(pair, d_score)
            yield
        place = layout.queries(self.queries * layout.tiles + index)
        d_query = layout.unstack(d_query)
        before = 0 if layout.blocks == 1 else jnp.where(self.block == 0, 0, memory.query_sum[place])
        memory.query_sum[place] = before + d_query

    def _d_attended(self, rows: pl.Slice) -> Float[Array, "rows tile"]:
        """Cotangents of the values that dropout keeps."""
        cotangent = self.memory.cotangent[0, rows]
        scaled = cotangent.astype(jnp.float32) / (1 - self.layout.dropout_rate)
        return self.layout.stack(scaled.astype(cotangent.dtype))

    def _add(self, sums: Any, places: list, products: Float[Array, "lanes keys"]) -> None:
        """Adds products to the sums of a pair of keys."""
        # The compiler does not know that the places differ: read all before any is written.
        of_tiles = jnp.split(products, len(places), axis=1)
        totals = [sums[place] + of_tile for place, of_tile in zip(places, of_tiles, strict=True)]
        for place, total in zip(places, totals, strict=True):
            sums[place] = total

    def _keep_window(self, pair: list[Keys], d_score: Float[Array, "rows keys"]) -> None:
        for keys, of_tile in zip(pair, jnp.split(d_score, len(pair), axis=1), strict=True):
            for apart in keys.near:
                inside = keys.apart == apart
                place = self.layout.near.index(apart)
                self.memory.window[place] = jnp.where(inside, of_tile, jnp.zeros_like(of_tile))

    def finish(self, index: int | Int[Array, ""]) -> Iterator[None]:
        """Adds to the gradients of the table and of queries what comes from the distances of the window."""
        layout, memory = self.layout, self.memory
        if not layout.relative:
            return
        by_distance = gradient_by_distance(layout, [memory.window[place] for place in range(len(layout.near))])
        for _ in range(layout.pairs + 1):  # until the others have been written
            yield
        query = layout.stack(memory.query[0, layout.queries(index)])
        d_query = multiply(by_distance, memory.reversed_table[...])
        memory.table_sum[...] += multiply(by_distance, query, OF_COLUMNS)
        place = layout.queries(self.queries * layout.tiles + index)
        memory.query_sum[place] += layout.unstack(d_query)

    def write_queries(self) -> None:
        layout, memory = self.layout, self.memory
        first = pl.multiple_of(self.queries * layout.block, layout.tile)
        memory.d_query[0] = memory.query_sum[pl.ds(first, layout.block)].astype(memory.d_query.dtype)

    def write_keys(self) -> None:
        layout, memory = self.layout, self.memory
        for number in range(layout.tiles):
            rows = layout.queries(number)
            memory.d_key[0, rows] = memory.key_sum[:, number].sum(0).T.astype(memory.d_key.dtype)
            memory.d_value[0, rows] = memory.value_sum[number].T.astype(memory.d_value.dtype)
        if layout.relative:  # whose reversed table has the rightmost distance first
            memory.table_sum[:1] += memory.key_sum[RIGHT].sum(0).T.sum(0, keepdims=True)
            memory.table_sum[layout.last : layout.last + 1] += memory.key_sum[LEFT].sum(0).T.sum(0, keepdims=True)

    def write_table(self) -> None:
        self.memory.d_table[0, 0] = self.memory.table_sum[...]


def backward_kernel(*memory: Any, layout: Layout) -> None:
    """Gradients of a block of queries and of a block of keys; for each block of keys, all blocks of queries."""
    _Backward(layout, BackwardMemory(*memory)).run()
