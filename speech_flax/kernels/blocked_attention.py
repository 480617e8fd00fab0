"""Attention in plain JAX, one block of queries after another: for processors without a kernel of their own.

Both passes hold the scores of one block alone, and compute the term of relative keys for the keys near the block alone:
keys further away all get the score of the leftmost or rightmost distance.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from speech_flax.kernels.attention import MASKED
from speech_flax.kernels.dropout import kept
from speech_flax.kernels.positions import skew

States = Float[Array, "batch frames heads head_size"]
Block = Float[Array, "batch heads block head_size"]
Padded = Float[Array, "batch heads columns head_size"]
Scores = Float[Array, "batch heads block columns"]


@dataclasses.dataclass(frozen=True)
class BlockedAttention:
    """Forward and backward pass of attention: a :class:`~speech_flax.kernels.fused_attention.Formulation`.

    Keys are padded such that the window of a block of queries, the keys at distances with their own embedding, starts
    at the column with the number of the block's first query.

    Attributes:
      left: Largest distance to the left with an embedding of its own; ``None`` without relative keys.
      dropout_rate: Share of the probabilities that are dropped.
      longest_block: Most queries of a block.
    """

    left: int | None
    dropout_rate: float
    longest_block: int = 128

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
        frames = query.shape[1]
        queries = self._cut(query)
        keys, values, mask = self._padded(key, value, mask, queries, embeddings)

        def step(_: None, block: tuple[Array, Block]) -> tuple[None, tuple[Array, Array]]:
            # What depends on a block's number alone, masks of its scores, a scan over layers would find to be the same
            # for all layers, and keep for all blocks: a tensor of queries and keys.
            first, query = lax.optimization_barrier(block)
            scores = self._scores(query, keys, mask, self._terms(query, embeddings), first)
            highest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            sums = weights.sum(-1, keepdims=True)
            weights = self._drop(weights, seeds, first, embeddings)
            attended = jnp.einsum(
                "bhqk,bhkd->bhqd", weights.astype(value.dtype), values, preferred_element_type=jnp.float32
            )
            attended = (attended / ((1 - self.dropout_rate) * sums)).astype(value.dtype)
            return None, (attended, (highest + jnp.log(sums))[..., 0])

        _, (attended, logsumexp) = lax.scan(step, None, (self._firsts(queries), queries))
        rows = jnp.moveaxis(logsumexp, 0, 2).reshape(*logsumexp.shape[1:3], -1)
        return self._join(attended, frames), rows[..., :frames]

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
        frames, dtype = query.shape[1], query.dtype
        queries = self._cut(query)
        keys, values, mask = self._padded(key, value, mask, queries, embeddings)
        of_sums = (attended.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(-1)
        cotangents = self._cut((cotangent / (1 - self.dropout_rate)).astype(dtype))
        logsumexps, of_sums = self._cut(logsumexp.swapaxes(1, 2)[..., None]), self._cut(of_sums[..., None])

        def step(sums: tuple, block: tuple) -> tuple[tuple, Block]:
            d_keys, d_values, d_embeddings = sums
            first, query, logsumexp, of_sums, cotangent = block
            terms, transpose_terms = jax.vjp(self._terms, query, embeddings)
            weights = self._scores(query, keys, mask, terms, first, lambda scores: jnp.exp(scores - logsumexp))
            d_weights = jnp.einsum("bhqd,bhkd->bhqk", cotangent, values, preferred_element_type=jnp.float32)
            dropped = self._drop(weights, seeds, first, embeddings).astype(dtype)
            d_scores = weights * (self._drop(d_weights, seeds, first, embeddings) - of_sums)
            d_terms = self._terms_transposed(d_scores, first, embeddings)
            d_scores = d_scores.astype(dtype)
            of_terms, of_embeddings = transpose_terms(d_terms)
            d_query = jnp.einsum("bhqk,bhkd->bhqd", d_scores, keys, preferred_element_type=jnp.float32)
            d_keys += jnp.einsum("bhqk,bhqd->bhkd", d_scores, query, preferred_element_type=jnp.float32)
            d_values += jnp.einsum("bhqk,bhqd->bhkd", dropped, cotangent, preferred_element_type=jnp.float32)
            d_embeddings = jax.tree.map(lambda total, part: total + part, d_embeddings, of_embeddings)
            return (d_keys, d_values, d_embeddings), d_query.astype(dtype) + of_terms

        zeros = jnp.zeros(keys.shape, jnp.float32)
        no_embeddings = None if embeddings is None else jnp.zeros(embeddings.shape, jnp.float32)
        (d_keys, d_values, d_embeddings), d_queries = lax.scan(
            step, (zeros, zeros, no_embeddings), (self._firsts(queries), queries, logsumexps, of_sums, cotangents)
        )
        before = self.left or 0
        d_key, d_value = (
            total[:, :, before : before + frames].swapaxes(1, 2).astype(dtype) for total in (d_keys, d_values)
        )
        if embeddings is not None:
            d_embeddings = d_embeddings.astype(embeddings.dtype)
        return self._join(d_queries, frames), d_key, d_value, d_embeddings

    def _cut(self, states: Float[Array, "batch frames heads size"]) -> Float[Array, "blocks batch heads block size"]:
        batch, frames, heads, size = states.shape
        blocks = -(-frames // self.longest_block)
        block = -(-frames // blocks)
        padded = jnp.pad(states, ((0, 0), (0, blocks * block - frames), (0, 0), (0, 0)))
        return padded.reshape(batch, blocks, block, heads, size).transpose(1, 0, 3, 2, 4)

    def _join(self, blocks: Float[Array, "blocks batch heads block size"], frames: int) -> States:
        number, batch, heads, block, size = blocks.shape
        return blocks.transpose(1, 0, 3, 2, 4).reshape(batch, number * block, heads, size)[:, :frames]

    def _firsts(self, queries: Float[Array, "blocks batch heads block size"]) -> Int[Array, "blocks"]:
        """The frame of the first query of every block."""
        return jnp.arange(queries.shape[0]) * queries.shape[3]

    def _padded(
        self, key: States, value: States, mask: Array, queries: Array, embeddings: Array | None
    ) -> tuple[Padded, Padded, Bool[Array, "batch columns"]]:
        """Keys, values and mask as columns of the scores."""
        if embeddings is None:
            return key.swapaxes(1, 2), value.swapaxes(1, 2), mask
        behind = embeddings.shape[0] - 1 - self.left + queries.shape[0] * queries.shape[3] - key.shape[1]
        widths = ((0, 0), (self.left, behind))
        keys, values = (jnp.pad(states.swapaxes(1, 2), ((0, 0), *widths, (0, 0))) for states in (key, value))
        return keys, values, jnp.pad(mask, widths)

    def _terms(self, query: Block, embeddings: Array | None) -> tuple[Array, Array, Array] | None:
        """Scores of positions: of the keys in the window, and of those left and right of it."""
        if embeddings is None:
            return None
        near = jnp.einsum("bhqd,nd->bhqn", query, embeddings, preferred_element_type=jnp.float32)
        block, distances = near.shape[2:]
        by_distance = jnp.pad(near, ((0, 0), (0, 0), (0, 0), (block - 1, block - 1)), mode="edge")
        return skew(by_distance, distances - 1 + block), near[..., :1], near[..., -1:]

    def _scores(
        self,
        query: Block,
        keys: Padded,
        mask: Array,
        terms: tuple | None,
        first: Array,
        finish: Callable[[Scores], Scores] = lambda scores: scores,
    ) -> Scores:
        """The scores of a block, of which ``finish`` makes something else one by one.

        XLA:CPU takes no vector instructions for what it fuses with the skewed window, so that is not to be all columns.
        """
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, keys, preferred_element_type=jnp.float32)
        mask = mask[:, None, None]
        if terms is None:
            return finish(jnp.where(mask, scores, MASKED))
        window, far_left, far_right = terms
        width, column = window.shape[-1], jnp.arange(keys.shape[2])
        scores += jnp.where(column < first, far_left, jnp.where(column >= first + width, far_right, 0))
        scores = jnp.where(mask, scores, MASKED)
        within = lax.dynamic_slice_in_dim(scores, first, width, 3) + window
        return lax.dynamic_update_slice_in_dim(finish(scores), finish(within), first, axis=3)

    def _terms_transposed(self, d_scores: Scores, first: Array, embeddings: Array | None) -> tuple | None:
        """Cotangents of :meth:`_terms`."""
        if embeddings is None:
            return None
        width, column = embeddings.shape[0] - 1 + d_scores.shape[2], jnp.arange(d_scores.shape[3])
        far_left = jnp.where(column < first, d_scores, 0).sum(-1, keepdims=True)
        far_right = jnp.where(column >= first + width, d_scores, 0).sum(-1, keepdims=True)
        return lax.dynamic_slice_in_dim(d_scores, first, width, axis=3), far_left, far_right

    def _drop(self, weights: Scores, seeds: Array, first: Array, embeddings: Array | None) -> Scores:
        if not self.dropout_rate:
            return weights
        queries = first + jnp.arange(weights.shape[2])[:, None]
        keys = jnp.arange(weights.shape[3])[None] - (0 if embeddings is None else self.left)
        return jnp.where(kept(seeds, queries, keys, self.dropout_rate), weights, 0)
