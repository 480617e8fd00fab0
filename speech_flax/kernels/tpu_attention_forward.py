"""The forward pass of the attention kernel for TPUs: softmax with running maxima and sums (Dao et al. 2022)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from speech_flax.kernels.products import OF_ROWS, multiply
from speech_flax.kernels.stages import interleave, prepared
from speech_flax.kernels.tpu_layout import Layout, seeds_of_heads, together
from speech_flax.kernels.tpu_relative_key import RelativeScores


class ForwardMemory(NamedTuple):
    """What a program reads, writes and keeps.

    Attributes:
      seeds: Of dropout ``[batch, heads]``.
      lengths: Frames of each row.
      query: ``[1, block, tile]``, as are ``key`` and ``value``.
      key: Of a block of keys.
      value: Of a block of keys.
      mask: Added to the scores of a block of keys ``[1, 1, block]``.
      table: Embeddings of distances.
      attended: Output, as ``query``.
      logsumexp: Logarithms of sums of exponentiated scores ``[1, 1, group, block]``.
      scores: Of the next tile of queries, for all pairs of keys ``[pairs, rows, pair]``.
      highest: Of these scores, by lanes ``[rows, tile]``.
      sides: Of :class:`~speech_flax.kernels.tpu_relative_key.RelativeScores`.
      maxima: Highest scores of all queries in the blocks of keys so far ``[tiles, rows, 1]``.
      sums: Sums of exponentiated scores so far ``[tiles, rows, 1]``.
      weighted: Weighted values so far, normalised ``[tiles, rows, tile]``.
    """

    seeds: Any
    lengths: Any
    query: Any
    key: Any
    value: Any
    mask: Any
    table: Any
    attended: Any
    logsumexp: Any
    scores: Any
    highest: Any
    sides: Any
    maxima: Any
    sums: Any
    weighted: Any


class _Forward:
    """One program: the queries of a block, tile by tile, and a block of keys."""

    def __init__(self, layout: Layout, memory: ForwardMemory) -> None:
        self.layout, self.memory = layout, memory
        self.row, self.queries, self.block = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        self.seeds = seeds_of_heads(layout, memory.seeds)

    def run(self) -> None:
        layout, memory = self.layout, self.memory
        layout.clear(self.block, memory.key, memory.value)

        @layout.when(self.block * layout.block < memory.lengths[self.row])
        def _() -> None:
            interleave((0, self.score(0)))
            last = layout.tiles - 1
            lax.fori_loop(0, last, lambda index, _: self.step(index, self.score(index + 1)), None)
            self.step(last, iter(()))

    @prepared
    def score(self, index: int | Int[Array, ""]) -> Iterator[None]:
        """Computes the scores of a tile of queries, a pair of keys in each turn."""
        layout, memory = self.layout, self.memory
        query = layout.stack(memory.query[0, layout.queries(index)])
        added = RelativeScores(layout, query, memory.table[...], memory.sides) if layout.relative else None
        highest = None
        yield
        for number, pair in enumerate(layout.keys(self.queries, self.block, index)):
            products = multiply(query, together(memory.key[0, keys.rows] for keys in pair), OF_ROWS)
            for place, keys in enumerate(pair):
                lanes = slice(place * layout.tile, (place + 1) * layout.tile)
                score = products[:, lanes] + memory.mask[0, :, keys.rows]
                score = score if added is None else score + added.of(keys)
                memory.scores[number, :, lanes] = score
                highest = score if highest is None else jnp.maximum(highest, score)
            yield
        memory.highest[...] = highest

    def step(self, index: int | Int[Array, ""], score_next: Iterator[None]) -> None:
        """Attends from a tile of queries, next to the scores of the next one."""
        layout, memory = self.layout, self.memory
        highest = memory.highest[...].max(1, keepdims=True)
        if layout.blocks > 1:
            before = jnp.where(self.block == 0, -jnp.inf, memory.maxima[index])
            highest = jnp.maximum(highest, before)
        summed = attended = jnp.zeros((layout.rows, layout.tile), jnp.float32)
        for number, pair in enumerate(layout.keys(self.queries, self.block, index)):
            width = len(pair) * layout.tile
            weights = jnp.exp(memory.scores[number, :, :width] - highest)
            for of_tile in jnp.split(weights, len(pair), axis=1):
                summed += of_tile
            if layout.dropout_rate:
                weights = jnp.where(layout.kept(self.seeds, self.queries, index, self.block, pair), weights, 0)
            next(score_next, None)
            values = together(memory.value[0, keys.rows] for keys in pair)
            attended += multiply(weights.astype(values.dtype), values)
        interleave((0, score_next))
        summed = summed.sum(1, keepdims=True)
        if layout.blocks > 1:
            shrink = jnp.exp(before - highest)
            summed += shrink * jnp.where(self.block == 0, 0, memory.sums[index])
            attended += shrink * jnp.where(self.block == 0, 0, memory.weighted[index])
            memory.maxima[index], memory.sums[index], memory.weighted[index] = highest, summed, attended
        # With several blocks of keys this is of those so far, and stays when the last one has been seen.
        attended *= 1 / ((1 - layout.dropout_rate) * summed)
        rows = layout.queries(index)
        memory.attended[0, rows] = layout.unstack(attended).astype(memory.attended.dtype)
        memory.logsumexp[0, 0, :, rows] = layout.as_rows(highest + jnp.log(summed))


def forward_kernel(*memory: Any, layout: Layout) -> None:
    """Attended values of a block of queries, from all blocks of keys one after another."""
    _Forward(layout, ForwardMemory(*memory)).run()
