"""Flash attention (Dao et al. 2022) with the scores of relative keys gathered inside, for NVIDIA GPUs, in Triton.

A query has one score for each distance with an embedding: a small product, computed outside. Inside, the scores of a
block of keys near the queries are gathered from it by distance; keys further away all get the score of the leftmost or
rightmost distance, one column. Nothing with both queries and keys leaves the chip.

What was run: in interpret mode both passes equal the definition, and they compile to machine code for A100, L40 and
H100. No GPU was to be had: neither speed nor numbers on one are known yet.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.attention import MASKED
from speech_flax.kernels.dropout import kept
from speech_flax.kernels.products import multiply

#: Where the keys of a block lie, as seen from a block of queries: on which side, or near some of them.
LEFT, NEAR, RIGHT = "left", "near", "right"

_OPERANDS = ("states", "states", "states", "mask", "terms", "seeds", "lengths", "states", "rows", "rows", "terms")

States = Float[Array, "batch frames heads head_size"]
Blocks = list[tuple[str, int | Array, int | Array]]
Terms = Float[Array, "batch heads frames columns"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one kernel: a program owns a block of queries (or keys) of one head and visits all keys (or queries).

    Attributes:
      frames: Of the input.
      head_size: Of the input.
      lanes: Head size in the kernel, a power of two.
      queries: In a block.
      keys: In a block.
      left: Distance from which on all keys to the left have the same score; ``None`` without relative keys.
      right: The same to the right.
      dropout_rate: Share of the probabilities that are dropped.
    """

    frames: int
    head_size: int
    lanes: int
    queries: int
    keys: int
    left: int | None
    right: int
    dropout_rate: float

    @property
    def warps(self) -> int:
        """As many as hold the sums of a block in registers."""
        return 8 if self.queries * self.lanes > 4096 or self.lanes > 64 else 4

    def spec(self, kind: str) -> pl.BlockSpec:
        """The part of an array that the programs of one head of one row of a batch see; each finds its block in it."""
        frames = pl.cdiv(self.frames, max(self.queries, self.keys)) * max(self.queries, self.keys)
        distances = 0 if self.left is None else self.left + self.right + 1
        shape, of_program = {
            "states": ((None, frames, None, self.lanes), lambda _, head, row: (row, 0, head, 0)),
            "mask": ((None, frames), lambda _, head, row: (row, 0)),
            "terms": ((None, None, frames, distances), lambda _, head, row: (row, head, 0, 0)),
            "seeds": ((None, None), lambda _, head, row: (row, head)),
            "lengths": ((None,), lambda _, head, row: (row,)),
            "rows": ((None, None, frames), lambda _, head, row: (row, head, 0)),
        }[kind]
        return pl.BlockSpec(shape, of_program)

    def load(self, ref, first: Array, size: int) -> Float[Array, "rows lanes"]:
        """A block of states, zeros beyond the input."""
        mask = self.within(first, size)
        if self.lanes > self.head_size:
            mask &= jnp.arange(self.lanes)[None] < self.head_size
        return triton.load(ref.at[pl.ds(first, size), :], mask=mask, other=0.0)

    def load_numbers(self, ref, first: Array, size: int, other: float = 0.0) -> Float[Array, "rows"]:
        """A block of numbers, ``other`` beyond the input."""
        return triton.load(ref.at[pl.ds(first, size)], mask=first + jnp.arange(size) < self.frames, other=other)

    def store(self, ref, first: Array, states: Float[Array, "rows lanes"]) -> None:
        mask = self.within(first, states.shape[0])
        if self.lanes > self.head_size:
            mask &= jnp.arange(self.lanes)[None] < self.head_size
        triton.store(ref.at[pl.ds(first, states.shape[0]), :], states.astype(ref.dtype), mask=mask)

    def positions(self, first_query: Array, first_key: Array) -> tuple[Int[Array, "queries 1"], Int[Array, "1 keys"]]:
        """Numbers of the frames of a block of queries and a block of keys."""
        return first_query + jnp.arange(self.queries)[:, None], first_key + jnp.arange(self.keys)[None]

    def near(
        self, first_query: Array, first_key: Array
    ) -> tuple[Int[Array, "queries keys"], Int[Array, "queries keys"]]:
        """Where in the terms the score of every pair is: its row, and its column, which is the clipped distance."""
        queries, keys = self.positions(first_query, first_key)
        distance = jnp.minimum(jnp.maximum(keys - queries, -self.left), self.right) + self.left
        return jnp.broadcast_to(queries, distance.shape), distance

    def far(self, ref, side: str, first_query: Array):
        """Where in the terms the scores of all keys on one side are."""
        column = 0 if side == LEFT else self.left + self.right
        return ref.at[pl.ds(first_query, self.queries), pl.ds(column, 1)]

    def within(self, first: Array, size: int) -> Bool[Array, "rows 1"]:
        """Which frames of a block are of the input."""
        return (first + jnp.arange(size))[:, None] < self.frames

    def terms(self, ref, side: str, first_query: Array, first_key: Array) -> Float[Array, "queries #keys"]:
        """Scores of a block of pairs that stem from their distances."""
        if side != NEAR:
            mask = self.within(first_query, self.queries)
            return triton.load(self.far(ref, side, first_query), mask=mask, other=0.0)
        rows, distance = self.near(first_query, first_key)
        return triton.load(ref.at[rows, distance], mask=rows < self.frames, other=0.0)

    def blocks_of_keys(self, first_query: Array, length: Array) -> Blocks:
        """The side on which blocks of keys lie, the first of them, and the one after the last."""
        blocks = _round_up_division(length, self.keys)
        if self.left is None:
            return [(NEAR, 0, blocks)]
        near = jnp.minimum(_division(first_query - self.left + 1, self.keys), blocks)
        right = jnp.minimum(_round_up_division(first_query + self.queries - 1 + self.right, self.keys), blocks)
        return [(LEFT, 0, near), (NEAR, near, right), (RIGHT, right, blocks)]

    def blocks_of_queries(self, first_key: Array, length: Array) -> Blocks:
        """The side of these queries on which a block of keys lies, the first block, and the one after the last."""
        blocks = (first_key < length).astype(jnp.int32) * pl.cdiv(self.frames, self.queries)
        if self.left is None:
            return [(NEAR, 0, blocks)]
        near = jnp.minimum(_division(first_key - self.right + 1, self.queries), blocks)
        left = jnp.minimum(_round_up_division(first_key + self.keys - 1 + self.left, self.queries), blocks)
        return [(RIGHT, 0, near), (NEAR, near, left), (LEFT, left, blocks)]


def _division(number: Array, divisor: int) -> Int[Array, ""]:
    """Rounded down; 0 for negative numbers."""
    return lax.div(jnp.maximum(number, 0), divisor)


def _round_up_division(number: Array, divisor: int) -> Int[Array, ""]:
    return lax.div(number + divisor - 1, divisor)


def _visit(blocks: Blocks, step: Callable, carry: tuple) -> tuple:
    """``step(side, index, carry)`` for every block."""
    for side, start, stop in blocks:
        carry = lax.fori_loop(start, stop, partial(step, side), carry)
    return carry


def _forward_kernel(
    query_ref, key_ref, value_ref, mask_ref, terms_ref, seed_ref, length_ref, attended_ref, logsumexp_ref, *, plan: Plan
):  # fmt: skip
    first_query = pl.program_id(0) * plan.queries
    query, seed = plan.load(query_ref, first_query, plan.queries), seed_ref[...]

    def step(side: str, index: Array, carry: tuple) -> tuple:
        attended, highest, sums = carry
        first_key = index * plan.keys
        key, value = (plan.load(ref, first_key, plan.keys) for ref in (key_ref, value_ref))
        scores = multiply(query, key.T) + plan.load_numbers(mask_ref, first_key, plan.keys, MASKED)[None]
        if terms_ref is not None:
            scores += plan.terms(terms_ref, side, first_query, first_key)
        higher = jnp.maximum(highest, scores.max(1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(highest - higher)
        sums = sums * shrink + weights.sum(1)
        if plan.dropout_rate:
            weights = jnp.where(kept(seed, *plan.positions(first_query, first_key), plan.dropout_rate), weights, 0.0)
        return attended * shrink[:, None] + multiply(weights.astype(value.dtype), value), higher, sums

    nothing = jnp.zeros((plan.queries, plan.lanes), jnp.float32)
    numbers = jnp.zeros(plan.queries, jnp.float32)
    blocks = plan.blocks_of_keys(first_query, length_ref[...])
    attended, highest, sums = _visit(blocks, step, (nothing, numbers - jnp.inf, numbers))
    plan.store(attended_ref, first_query, attended / ((1 - plan.dropout_rate) * sums)[:, None])
    mask = first_query + jnp.arange(plan.queries) < plan.frames
    triton.store(logsumexp_ref.at[pl.ds(first_query, plan.queries)], highest + jnp.log(sums), mask=mask)


def _queries_kernel(
    query_ref, key_ref, value_ref, mask_ref, terms_ref, seed_ref, length_ref, cotangent_ref, logsumexp_ref, delta_ref,
    zeros_ref, d_query_ref, d_terms_ref=None, *, plan: Plan,
):  # fmt: skip
    """Gradients of a block of queries through the content, and of the terms; ``zeros_ref`` is ``d_terms_ref``."""
    first_query = pl.program_id(0) * plan.queries
    query, cotangent = (plan.load(ref, first_query, plan.queries) for ref in (query_ref, cotangent_ref))
    logsumexp, delta = (plan.load_numbers(ref, first_query, plan.queries) for ref in (logsumexp_ref, delta_ref))
    seed, rescale = seed_ref[...], 1 / (1 - plan.dropout_rate)

    def step(side: str, index: Array, carry: tuple) -> tuple:
        d_query, d_left, d_right = carry
        first_key = index * plan.keys
        key, value = (plan.load(ref, first_key, plan.keys) for ref in (key_ref, value_ref))
        scores = multiply(query, key.T) + plan.load_numbers(mask_ref, first_key, plan.keys, MASKED)[None]
        if terms_ref is not None:
            scores += plan.terms(terms_ref, side, first_query, first_key)
        weights = jnp.exp(scores - logsumexp[:, None])
        d_weights = multiply(cotangent, value.T)
        if plan.dropout_rate:
            positions = plan.positions(first_query, first_key)
            d_weights = jnp.where(kept(seed, *positions, plan.dropout_rate), d_weights * rescale, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        d_query += multiply(d_scores.astype(key.dtype), key)
        if terms_ref is not None and side == NEAR:
            rows, distance = plan.near(first_query, first_key)
            is_left, is_right = distance == 0, distance == plan.left + plan.right
            d_left += jnp.where(is_left, d_scores, 0.0).sum(1)
            d_right += jnp.where(is_right, d_scores, 0.0).sum(1)
            # Between its ends every distance of a query has one key.
            mask = ~(is_left | is_right) & (rows < plan.frames)
            triton.store(d_terms_ref.at[rows, distance], d_scores, mask=mask)
        elif side == LEFT:
            d_left += d_scores.sum(1)
        elif side == RIGHT:
            d_right += d_scores.sum(1)
        return d_query, d_left, d_right

    nothing = jnp.zeros((plan.queries, plan.lanes), jnp.float32)
    numbers = jnp.zeros(plan.queries, jnp.float32)
    blocks = plan.blocks_of_keys(first_query, length_ref[...])
    d_query, d_left, d_right = _visit(blocks, step, (nothing, numbers, numbers))
    plan.store(d_query_ref, first_query, d_query)
    if terms_ref is not None:
        mask = plan.within(first_query, plan.queries)
        for side, gradient in ((LEFT, d_left), (RIGHT, d_right)):
            triton.store(plan.far(d_terms_ref, side, first_query), gradient[:, None], mask=mask)


def _keys_kernel(
    query_ref, key_ref, value_ref, mask_ref, terms_ref, seed_ref, length_ref, cotangent_ref, logsumexp_ref, delta_ref,
    d_key_ref, d_value_ref, *, plan: Plan,
):  # fmt: skip
    """Gradients of a block of keys and values. Scores are transposed, keys by queries, as their products need them."""
    first_key = pl.program_id(0) * plan.keys
    key, value = (plan.load(ref, first_key, plan.keys) for ref in (key_ref, value_ref))
    mask = plan.load_numbers(mask_ref, first_key, plan.keys, MASKED)
    seed, rescale = seed_ref[...], 1 / (1 - plan.dropout_rate)

    def step(side: str, index: Array, carry: tuple) -> tuple:
        d_key, d_value = carry
        first_query = index * plan.queries
        query, cotangent = (plan.load(ref, first_query, plan.queries) for ref in (query_ref, cotangent_ref))
        logsumexp, delta = (plan.load_numbers(ref, first_query, plan.queries) for ref in (logsumexp_ref, delta_ref))
        scores = multiply(key, query.T) + mask[:, None]
        if terms_ref is not None:
            scores += plan.terms(terms_ref, side, first_query, first_key).T
        weights = jnp.exp(scores - logsumexp[None])
        d_weights = multiply(value, cotangent.T)
        dropped = weights
        if plan.dropout_rate:
            queries, keys = plan.positions(first_query, first_key)
            keep = kept(seed, queries.T, keys.T, plan.dropout_rate)
            dropped = jnp.where(keep, weights * rescale, 0.0)
            d_weights = jnp.where(keep, d_weights * rescale, 0.0)
        d_value += multiply(dropped.astype(cotangent.dtype), cotangent)
        d_scores = weights * (d_weights - delta[None])
        d_key += multiply(d_scores.astype(query.dtype), query)
        return d_key, d_value

    nothing = jnp.zeros((plan.keys, plan.lanes), jnp.float32)
    blocks = plan.blocks_of_queries(first_key, length_ref[...])
    d_key, d_value = _visit(blocks, step, (nothing, nothing))
    plan.store(d_key_ref, first_key, d_key)
    plan.store(d_value_ref, first_key, d_value)


@dataclasses.dataclass(frozen=True)
class GPUAttention:
    """Forward and backward pass of attention: a :class:`~speech_flax.kernels.fused_attention.Formulation`.

    Attributes:
      left: Largest distance to the left with an embedding of its own; ``None`` without relative keys.
      dropout_rate: Share of the probabilities that are dropped.
      longest_block: Most frames of a block.
      interpret: Run without a GPU, slowly.
    """

    left: int | None
    dropout_rate: float
    longest_block: int = 128
    interpret: bool = False

    def suits(self, head_size: int) -> bool:
        """Whether blocks of the states fit the registers."""
        return head_size <= 128

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
        plan = self._plan(query, embeddings, queries=128)
        operands = (query, key, value, *self._prepared(query, mask, embeddings, seeds))
        attended, logsumexp = self._call(_forward_kernel, plan, operands, "states", "rows")
        return attended, logsumexp

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
        cotangent = cotangent.astype(query.dtype)
        delta = (attended.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        prepared = self._prepared(query, mask, embeddings, seeds)
        operands = (query, key, value, *prepared, cotangent, logsumexp, delta)
        plan = self._plan(query, embeddings, queries=64)
        d_key, d_value = self._call(_keys_kernel, plan, operands, "states", "states")
        if embeddings is None:
            (d_query,) = self._call(_queries_kernel, plan, (*operands, None), "states")
            return d_query, d_key, d_value, None
        zeros = jnp.zeros_like(prepared[1])
        d_query, d_terms = self._call(
            _queries_kernel, plan, (*operands, zeros), "states", "terms", aliases={len(operands): 1}
        )
        of_terms, d_embeddings = jax.vjp(_terms, query, embeddings)[1](d_terms)
        return d_query + of_terms, d_key, d_value, d_embeddings

    def _plan(self, query: States, embeddings: Array | None, queries: int) -> Plan:
        """Sizes that keep operands and sums in the registers, and fit the shared memory of small GPUs (99 KiB)."""
        frames, head_size = query.shape[1], query.shape[3]
        # Products of float32 take no matrix units but many registers.
        longest = min(self.longest_block, 32 if query.dtype == jnp.float32 else 128)
        right = 0 if embeddings is None else embeddings.shape[0] - self.left
        return Plan(
            frames=frames,
            head_size=head_size,
            lanes=max(16, pl.next_power_of_2(head_size)),
            queries=min(queries, longest),
            keys=min(64, longest),
            left=None if embeddings is None else self.left + 1,
            right=right,
            dropout_rate=self.dropout_rate,
        )

    def _prepared(self, query: States, mask: Array, embeddings: Array | None, seeds: Array) -> tuple[Array | None, ...]:
        """What the kernels add to the scores, and what tells them how far to go."""
        added = jnp.where(mask, 0.0, MASKED).astype(jnp.float32)
        terms = None if embeddings is None else _terms(query, embeddings)
        lengths = jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0).max(-1).astype(jnp.int32)
        return added, terms, seeds, lengths

    def _call(
        self,
        kernel: Callable,
        plan: Plan,
        operands: tuple[Array | None, ...],
        *results: str,
        aliases: dict | None = None,
    ) -> tuple[Array, ...]:
        """What a kernel returns. Its programs own blocks of the keys if it is theirs, else of the queries."""
        query, _, _, _, terms, *_ = operands
        batch, frames, heads, _ = query.shape
        shapes = {
            "states": jax.ShapeDtypeStruct(query.shape, query.dtype),
            "rows": jax.ShapeDtypeStruct((batch, heads, frames), jnp.float32),
            "terms": terms,
        }
        owned = plan.keys if kernel is _keys_kernel else plan.queries
        return pl.pallas_call(
            partial(kernel, plan=plan),
            grid=(pl.cdiv(frames, owned), heads, batch),
            in_specs=[
                None if operand is None else plan.spec(kind) for kind, operand in zip(_OPERANDS, operands, strict=False)
            ],
            out_specs=tuple(plan.spec(kind) for kind in results),
            out_shape=tuple(jax.ShapeDtypeStruct(shapes[kind].shape, shapes[kind].dtype) for kind in results),
            input_output_aliases=aliases or {},
            compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=2),
            interpret=self.interpret,
        )(*operands)


def _terms(query: States, embeddings: Float[Array, "distances head_size"]) -> Terms:
    """Scores of all distances, with one more at both ends: so those at the ends are of clipped distances alone."""
    extended = jnp.pad(embeddings, ((1, 1), (0, 0)), mode="edge")
    return jnp.einsum("bqhd,nd->bhqn", query, extended, preferred_element_type=jnp.float32)
