"""Flash attention (Dao et al. 2022) with the scores of relative keys computed inside, for TPUs.

The term of relative keys costs one product with the table of embeddings for each tile of queries; a strided roll moves
it to its place next to the diagonal. Nothing with both queries and keys leaves the chip.

Every step is written for all tiles of keys before the next: the compiler keeps to the order of the text by and large,
and matrix units that wait for one tile's softmax have another tile's products to compute meanwhile.
"""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from speech_flax.kernels.products import OF_COLUMNS, OF_ROWS, multiply
from speech_flax.kernels.tpu_layout import LEFT, NEAR, RIGHT, Layout
from speech_flax.kernels.tpu_relative_key import RelativeScores, gradient_by_distance

#: Programs of different rows and heads are independent; those of one head share sums.
_SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
_MEMORY_LIMIT = 100 * 2**20

Rows = Float[Array, "batch frames lanes"]


def _as_rows(layout: Layout, column: Float[Array, "rows 1"]) -> Float[Array, "group tile"]:
    """A row for each head, without a transposition."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (layout.tile, layout.tile), axis) for axis in (0, 1))
    of_heads = layout.heads(column)
    return jnp.concatenate([jnp.where(row == lane, of_head, 0).sum(0, keepdims=True) for of_head in of_heads])


def _as_column(layout: Layout, values: Float[Array, "group tile"]) -> Float[Array, "rows 1"]:
    row, lane = (lax.broadcasted_iota(jnp.int32, (layout.tile, layout.tile), axis) for axis in (0, 1))
    of_heads = (values[head : head + 1] for head in range(layout.group))
    return jnp.concatenate([jnp.where(row == lane, of_head, 0).sum(1, keepdims=True) for of_head in of_heads])


def _tile(layout: Layout, index: Array) -> pl.Slice:
    """The rows of a block that its ``index``-th tile of queries has."""
    return pl.ds(pl.multiple_of(index * layout.tile, layout.tile), layout.tile)


def _seeds_of_heads(layout: Layout, seeds) -> list[Array]:
    row, group = pl.program_id(0), pl.program_id(1)
    return [seeds[row, group * layout.group + head] for head in range(layout.group)] if layout.dropout_rate else []


def _add(sums_ref, places: Iterable, products: Iterable[Array]) -> None:
    """Add products to the sums at these places, which differ."""
    # The compiler does not know that they differ: read all before any is written.
    places = list(places)
    sums = [sums_ref[place] + product for place, product in zip(places, products, strict=True)]
    for place, total in zip(places, sums, strict=True):
        sums_ref[place] = total


def _forward_kernel(
    seeds, lengths, q_ref, k_ref, v_ref, mask_ref, table_ref, o_ref, lse_ref, scores_ref, sides_ref, m_ref, l_ref,
    acc_ref, *, layout: Layout,
):  # fmt: skip
    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    seeds_of_heads = _seeds_of_heads(layout, seeds)
    layout.clear(j, k_ref, v_ref)

    def step(index: Array, carry: None) -> None:
        rows = _tile(layout, index)
        query = layout.stack(q_ref[0, rows])
        added = RelativeScores(layout, query, table_ref[...], sides_ref) if layout.relative else None
        tiles = layout.keys(i, j, index)
        highest = None
        for number, keys in enumerate(tiles):
            score = multiply(query, k_ref[0, keys.rows], OF_ROWS) + mask_ref[0, :, keys.rows]
            score = score if added is None else score + added.of(keys)
            scores_ref[number] = score
            highest = score if highest is None else jnp.maximum(highest, score)
        highest = highest.max(1, keepdims=True)
        if layout.blocks > 1:
            before = jnp.where(j == 0, -jnp.inf, m_ref[index])
            highest = jnp.maximum(highest, before)
        summed = attended = jnp.zeros((layout.rows, layout.tile), jnp.float32)
        for number, keys in enumerate(tiles):
            weights = jnp.exp(scores_ref[number] - highest)
            summed += weights
            if layout.dropout_rate:
                weights = jnp.where(layout.kept(seeds_of_heads, i, index, j, keys), weights, 0)
            attended += multiply(weights.astype(v_ref.dtype), v_ref[0, keys.rows])
        summed = summed.sum(1, keepdims=True)
        if layout.blocks > 1:
            shrink = jnp.exp(before - highest)
            summed += shrink * jnp.where(j == 0, 0, l_ref[index])
            attended += shrink * jnp.where(j == 0, 0, acc_ref[index])
            m_ref[index], l_ref[index], acc_ref[index] = highest, summed, attended
        # With several blocks of keys this is of those so far, and stays when the last one has been seen.
        attended *= 1 / ((1 - layout.dropout_rate) * summed)
        o_ref[0, rows] = layout.unstack(attended).astype(o_ref.dtype)
        lse_ref[0, 0, :, rows] = _as_rows(layout, highest + jnp.log(summed))

    @pl.when(j * layout.block < lengths[row])
    def _():
        lax.fori_loop(0, layout.tiles, step, None)


def _backward_kernel(
    seeds, lengths, q_ref, k_ref, v_ref, mask_ref, table_ref, reversed_ref, o_ref, lse_ref, do_ref, dq_ref, dk_ref,
    dv_ref, dtable_ref, sides_ref, keys_ref, dq_sum, dk_sum, dv_sum, dtable_sum, *, layout: Layout,
):  # fmt: skip
    row, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    seeds_of_heads = _seeds_of_heads(layout, seeds)
    last = slice(layout.last, layout.last + 1)
    layout.clear(j, k_ref, v_ref)
    layout.clear(i, q_ref, o_ref, do_ref)

    @pl.when((j == 0) & (i == 0))
    def _():
        dtable_sum[...] = jnp.zeros_like(dtable_sum)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        keys_ref[NEAR] = k_ref[0]
        if layout.relative:  # outside the window a key always comes together with the embedding of its side
            keys_ref[LEFT] = k_ref[0] + table_ref[:1]
            keys_ref[RIGHT] = k_ref[0] + table_ref[last]

    def step(index: Array, carry: None) -> None:
        rows = _tile(layout, index)
        tiles = layout.keys(i, j, index)
        query, logsumexp = layout.stack(q_ref[0, rows]), _as_column(layout, lse_ref[0, 0, :, rows])
        cotangent = do_ref[0, rows].astype(jnp.float32)
        products = layout.stack(cotangent * o_ref[0, rows].astype(jnp.float32)).sum(1, keepdims=True)
        d_attended = layout.stack((cotangent / (1 - layout.dropout_rate)).astype(query.dtype))
        added = RelativeScores(layout, query, table_ref[...], sides_ref, logsumexp) if layout.relative else None
        scores = [multiply(query, k_ref[0, keys.rows], OF_ROWS) for keys in tiles]
        d_weights = [multiply(d_attended, v_ref[0, keys.rows], OF_ROWS) for keys in tiles]
        shifts = [mask_ref[0, :, keys.rows] + (-logsumexp if added is None else added.of(keys)) for keys in tiles]
        dropped = weights = [jnp.exp(score + shift) for score, shift in zip(scores, shifts, strict=True)]
        if layout.dropout_rate:
            kept = [layout.kept(seeds_of_heads, i, index, j, keys) for keys in tiles]
            dropped = [jnp.where(mask, array, 0) for mask, array in zip(kept, weights, strict=True)]
            d_weights = [jnp.where(mask, array, 0) for mask, array in zip(kept, d_weights, strict=True)]
        d_scores = [(w * (d - products)).astype(query.dtype) for w, d in zip(weights, d_weights, strict=True)]
        d_values = [multiply(array.astype(query.dtype), d_attended, OF_COLUMNS) for array in dropped]
        _add(dv_sum, [keys.rows for keys in tiles], d_values)
        by_distance = gradient_by_distance(layout, tiles, d_scores) if layout.relative else None
        places = [(keys.place, keys.rows) for keys in tiles]
        _add(dk_sum, places, [multiply(d_score, query, OF_COLUMNS) for d_score in d_scores])
        d_query = jnp.zeros((layout.rows, layout.tile), jnp.float32)
        for place, d_score in zip(places, d_scores, strict=True):
            d_query += multiply(d_score, keys_ref[place])
        if layout.relative:
            d_query += multiply(by_distance, reversed_ref[...])
            dtable_sum[...] += multiply(by_distance, query, OF_COLUMNS)
        d_query, place = layout.unstack(d_query), _tile(layout, i * layout.tiles + index)
        dq_sum[place] = d_query if layout.blocks == 1 else d_query + jnp.where(j == 0, 0, dq_sum[place])

    @pl.when(j * layout.block < lengths[row])
    def _():
        lax.fori_loop(0, layout.tiles, step, None)

    @pl.when(j == layout.blocks - 1)
    def _():
        dq_ref[0] = dq_sum[pl.ds(pl.multiple_of(i * layout.block, layout.tile), layout.block)].astype(dq_ref.dtype)

    @pl.when(i == layout.blocks - 1)
    def _():
        dk_ref[0] = dk_sum[...].sum(0).astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)
        if layout.relative:
            dtable_sum[:1] += dk_sum[RIGHT].sum(0, keepdims=True)
            dtable_sum[last] += dk_sum[LEFT].sum(0, keepdims=True)

    @pl.when((i == layout.blocks - 1) & (j == layout.blocks - 1))
    def _():
        dtable_ref[0, 0] = dtable_sum[...]


def _call(
    kernel, layout: Layout, products: int, grid, in_specs, out_specs, out_shape, scratch, interpret: bool
):  # fmt: skip
    """The kernel's call; ``products`` is how many products of all frames with all others it computes."""
    batch, frames, lanes = out_shape[0].shape
    pairs = batch * frames * frames
    arrays = sum(math.prod(array.shape) * array.dtype.itemsize for array in out_shape)
    cost = pl.CostEstimate(  # XLA schedules by it, and the preflight counts by it
        flops=2 * products * pairs * lanes,
        transcendentals=pairs * layout.group * (lanes // layout.tile),
        bytes_accessed=arrays * 3,
    )
    return pl.pallas_call(
        partial(kernel, layout=layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        interpret=interpret,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(dimension_semantics=_SEMANTICS, vmem_limit_bytes=_MEMORY_LIMIT),
    )


def forward(
    layout: Layout,
    query: Rows,
    key: Rows,
    value: Rows,
    mask: Float[Array, "batch 1 padded"],
    table: Float[Array, "table tile"],
    seeds: Int[Array, "batch heads"],
    lengths: Int[Array, "batch"],
    interpret: bool,
) -> tuple[Rows, Float[Array, "batch groups group padded"]]:
    """Attended values, and logarithms of the sums of exponentiated scores."""
    batch, _, lanes = query.shape
    tile, block = layout.tile, layout.block
    groups = lanes // tile
    queries = pl.BlockSpec((1, block, tile), lambda b, h, i, j, *_: (b, i, h))
    keys = pl.BlockSpec((1, block, tile), lambda b, h, i, j, *_: (b, j, h))
    return _call(
        _forward_kernel,
        layout,
        2,
        (batch, groups, layout.blocks, layout.blocks),
        [
            queries,
            keys,
            keys,
            pl.BlockSpec((1, 1, block), lambda b, h, i, j, *_: (b, 0, j)),
            pl.BlockSpec(table.shape, lambda *_: (0, 0)),
        ],
        [queries, pl.BlockSpec((1, 1, layout.group, block), lambda b, h, i, j, *_: (b, h, 0, i))],
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, groups, layout.group, layout.padded), jnp.float32),
        ],
        [
            pltpu.VMEM((layout.tiles, layout.rows, tile), jnp.float32),
            _sides(layout),
            *[pltpu.VMEM((layout.tiles, layout.rows, lanes), jnp.float32) for lanes in (1, 1, tile)],
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table)


def _sides(layout: Layout) -> pl.MemoryRef:
    """Memory of :class:`~speech_flax.kernels.tpu_relative_key.RelativeScores`."""
    return pltpu.VMEM((3, layout.rows, layout.tile), jnp.float32)


def backward(
    layout: Layout,
    query: Rows,
    key: Rows,
    value: Rows,
    mask: Float[Array, "batch 1 padded"],
    table: Float[Array, "table tile"],
    reversed_table: Float[Array, "table tile"],
    seeds: Int[Array, "batch heads"],
    lengths: Int[Array, "batch"],
    attended: Rows,
    logsumexp: Float[Array, "batch groups group padded"],
    cotangent: Rows,
    interpret: bool,
) -> tuple[Rows, Rows, Rows, Float[Array, "batch groups table tile"]]:
    """Gradients of queries, keys, values, and of the reversed table for every row and group of heads."""
    batch, _, lanes = query.shape
    tile, block, last = layout.tile, layout.block, layout.blocks - 1
    groups = lanes // tile
    queries = pl.BlockSpec((1, block, tile), lambda b, h, j, i, *_: (b, i, h))
    keys = pl.BlockSpec((1, block, tile), lambda b, h, j, i, *_: (b, j, h))
    places = 3 if layout.relative else 1
    return _call(
        _backward_kernel,
        layout,
        5,
        (batch, groups, layout.blocks, layout.blocks),
        [
            queries,
            keys,
            keys,
            pl.BlockSpec((1, 1, block), lambda b, h, j, i, *_: (b, 0, j)),
            *[pl.BlockSpec(table.shape, lambda *_: (0, 0))] * 2,
            queries,
            pl.BlockSpec((1, 1, layout.group, block), lambda b, h, j, i, *_: (b, h, 0, i)),
            queries,
        ],
        [
            # Written when the last block of keys has been seen; until then the window rests on the first block.
            pl.BlockSpec((1, block, tile), lambda b, h, j, i, *_: (b, jnp.where(j == last, i, 0), h)),
            keys,
            keys,
            pl.BlockSpec((1, 1, *table.shape), lambda b, h, j, i, *_: (b, h, 0, 0)),
        ],
        [
            *[jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3,
            jax.ShapeDtypeStruct((batch, groups, *table.shape), jnp.float32),
        ],
        [
            _sides(layout),
            pltpu.VMEM((places, block, tile), query.dtype),
            pltpu.VMEM((layout.padded, tile), jnp.float32),
            pltpu.VMEM((places, block, tile), jnp.float32),
            pltpu.VMEM((block, tile), jnp.float32),
            pltpu.VMEM(table.shape, jnp.float32),
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table, reversed_table, attended, logsumexp, cotangent)
