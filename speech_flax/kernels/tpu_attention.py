"""Flash attention (Dao et al. 2022) with the scores of relative keys computed inside, for TPUs.

The term of relative keys costs one product with the table of embeddings for each tile of queries; a strided roll moves
it to its place next to the diagonal. Nothing with both queries and keys leaves the chip.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from speech_flax.kernels.products import OF_COLUMNS, OF_ROWS, multiply
from speech_flax.kernels.tpu_layout import (
    Layout,
    reversal,
    scores,
    unskew,
)

#: Programs of different rows and heads are independent; those of one head share sums.
_SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
_MEMORY_LIMIT = 100 * 2**20

Rows = Float[Array, "batch frames lanes"]


def _as_row(column: Float[Array, "tile 1"]) -> Float[Array, "1 tile"]:
    """A transposed column, without a transposition."""
    size = column.shape[0]
    row, lane = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(row == lane, column, 0).sum(0, keepdims=True)


def _as_column(values: Float[Array, "1 tile"]) -> Float[Array, "tile 1"]:
    size = values.shape[1]
    row, lane = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return jnp.where(row == lane, values, 0).sum(1, keepdims=True)


def _forward_kernel(
    seeds, lengths, q_ref, k_ref, v_ref, mask_ref, table_ref, o_ref, lse_ref, scores_ref, sides_ref, m_ref, l_ref,
    acc_ref, *, layout: Layout,
):  # fmt: skip
    row, heads, i, j = (pl.program_id(axis) for axis in range(4))
    tile, group = layout.tile, layout.group
    first_key = j * layout.block

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(index: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(index * tile, tile), tile)
        first_query = i * layout.block + index * tile
        query, key, value = q_ref[0, rows], k_ref[0], v_ref[0]
        table = table_ref[...] if layout.relative else None
        total = acc_ref[rows]
        for head in range(group):
            of_head = layout.of_head(query, head)
            score = scores(
                layout,
                of_head,
                key,
                table,
                mask_ref[0],
                first_query,
                first_key,
                scores_ref.at[head],
                sides_ref.at[head],
            )
            before = m_ref[head, rows][:, :1]
            highest = jnp.maximum(before, score.max(1, keepdims=True))
            weights = jnp.exp(score - highest)
            shrink = jnp.exp(before - highest)
            m_ref[head, rows] = jnp.broadcast_to(highest, (tile, tile))
            summed = l_ref[head, rows][:, :1] * shrink + weights.sum(1, keepdims=True)
            l_ref[head, rows] = jnp.broadcast_to(summed, (tile, tile))
            if layout.dropout_rate:
                seed = seeds[row, heads * group + head]
                weights = jnp.where(layout.kept(seed, first_query, first_key), weights, 0)
            added = total * shrink + multiply(weights.astype(value.dtype), value)
            total = layout.merge(total, added, head)
        acc_ref[rows] = total

    @pl.when(first_key < lengths[row])
    def _():
        lax.fori_loop(0, layout.tiles, step, None)

    def finish(index: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(index * tile, tile), tile)
        attended = acc_ref[rows]
        for head in range(group):
            summed = l_ref[head, rows][:, :1]
            scaled = attended * (1 / ((1 - layout.dropout_rate) * summed))
            attended = layout.merge(attended, scaled, head)
            lse_ref[0, 0, head : head + 1, rows] = _as_row(m_ref[head, rows][:, :1] + jnp.log(summed))
        o_ref[0, rows] = attended.astype(o_ref.dtype)

    @pl.when(j == layout.blocks - 1)
    def _():
        lax.fori_loop(0, layout.tiles, finish, None)


def _backward_kernel(
    seeds, lengths, q_ref, k_ref, v_ref, mask_ref, table_ref, o_ref, lse_ref, do_ref, dq_ref, dk_ref, dv_ref,
    dtable_ref, scores_ref, sides_ref, ds_ref, dq_sum, dk_sum, dv_sum, dtable_sum, keys_ref, *, layout: Layout,
):  # fmt: skip
    row, heads, j, i = (pl.program_id(axis) for axis in range(4))
    tile, group, margin = layout.tile, layout.group, layout.margin
    first_key = j * layout.block
    dtype = q_ref.dtype
    rescale = 1 / (1 - layout.dropout_rate)

    @pl.when((j == 0) & (i == 0))
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        if layout.relative:
            dtable_sum[...] = jnp.zeros_like(dtable_sum)
            ds_ref[...] = jnp.zeros_like(ds_ref)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def of_sides(first_query: Array) -> Array:
        """Keys, each with the embedding of its side; whoever is in the window gets its own elsewhere."""
        last = layout.left + layout.right
        ends = (table_ref[:1], jnp.zeros_like(table_ref[:1]), table_ref[last : last + 1])
        for start in range(0, layout.block, tile):
            side = layout.side(first_query, first_key + start)
            end = jnp.where(side == 0, ends[0], jnp.where(side == 2, ends[2], ends[1]))
            keys_ref[start : start + tile] = k_ref[0, start : start + tile] + end
        return keys_ref[...]

    def step(index: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(index * tile, tile), tile)
        first_query = i * layout.block + index * tile
        query, key, value = q_ref[0, rows], k_ref[0], v_ref[0]
        table = table_ref[...] if layout.relative else None
        d_attended = do_ref[0, rows].astype(jnp.float32)
        products = d_attended * o_ref[0, rows].astype(jnp.float32)
        d_attended = (d_attended * rescale).astype(dtype)
        d_query = jnp.zeros((tile, tile), jnp.float32)
        keys = of_sides(first_query) if layout.relative else key
        for head in range(group):
            of_head = layout.of_head(query, head)
            score = scores(
                layout,
                of_head,
                key,
                table,
                mask_ref[0],
                first_query,
                first_key,
                scores_ref.at[head],
                sides_ref.at[head],
            )
            weights = jnp.exp(score - _as_column(lse_ref[0, 0, head : head + 1, rows]))
            d_head = layout.of_head(d_attended, head)
            d_weights = multiply(d_head, value, OF_ROWS)
            dropped = weights
            if layout.dropout_rate:
                kept = layout.kept(seeds[row, heads * group + head], first_query, first_key)
                dropped, d_weights = jnp.where(kept, weights, 0), jnp.where(kept, d_weights, 0)
            dv_sum[...] += multiply(dropped.astype(dtype), d_head, OF_COLUMNS)
            d_scores = weights * (d_weights - layout.of_head(products, head).sum(1, keepdims=True))
            d_scores = d_scores.astype(dtype)
            d_key = multiply(d_scores, of_head, OF_COLUMNS)
            d_of_head = multiply(d_scores, keys)
            if layout.relative:
                ds_ref[head, :, margin : margin + layout.block] = d_scores
                d_of_head += _backward_of_window(
                    layout, ds_ref.at[head], of_head, table, dtable_sum, first_query, first_key
                )
                for start in range(0, layout.block, tile):
                    side = layout.side(first_query, first_key + start)
                    dk_sum[side, start : start + tile] += d_key[start : start + tile]
            else:
                dk_sum[0] += d_key
            d_query = layout.merge(d_query, d_of_head, head)
        dq_sum[pl.ds(pl.multiple_of(first_query, tile), tile)] += d_query

    @pl.when(first_key < lengths[row])
    def _():
        lax.fori_loop(0, layout.tiles, step, None)

    @pl.when(j == layout.blocks - 1)
    def _():
        dq_ref[0] = dq_sum[pl.ds(pl.multiple_of(i * layout.block, tile), layout.block)].astype(dtype)

    @pl.when(i == layout.blocks - 1)
    def _():
        dk_ref[0] = dk_sum[...].sum(0).astype(dtype)
        dv_ref[0] = dv_sum[...].astype(dtype)
        if layout.relative:
            last = layout.left + layout.right
            dtable_sum[:1] += dk_sum[0].sum(0, keepdims=True)
            dtable_sum[last : last + 1] += dk_sum[2].sum(0, keepdims=True)

    @pl.when((i == layout.blocks - 1) & (j == layout.blocks - 1))
    def _():
        if layout.relative:
            dtable_ref[0, 0] = dtable_sum[...]


def _backward_of_window(
    layout: Layout, ds_ref, query: Array, table: Array, dtable_sum, first_query: Array, first_key: Array
) -> Float[Array, "tile lanes"]:
    """Gradient of a tile of queries through the embeddings of the window; adds that of the table to its sum."""
    column, touches = layout.window_start(first_query, first_key)
    reverse = reversal(layout.tile, query.dtype)
    by_distance = unskew(layout, ds_ref[:, pl.ds(column, layout.window)]).astype(query.dtype)
    by_distance = jnp.where(touches, by_distance, jnp.zeros_like(by_distance))
    reversed_query = multiply(reverse, query).astype(query.dtype)
    dtable_sum[...] += multiply(by_distance, reversed_query, OF_COLUMNS)
    return multiply(reverse, multiply(by_distance, table).astype(query.dtype))


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
    mask: Float[Array, "batch 1 frames"],
    table: Float[Array, "table tile"],
    seeds: Int[Array, "batch heads"],
    lengths: Int[Array, "batch"],
    interpret: bool,
) -> tuple[Rows, Float[Array, "batch groups group frames"]]:
    """Attended values, and logarithms of the sums of exponentiated scores."""
    batch, frames, lanes = query.shape
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
            jax.ShapeDtypeStruct((batch, groups, layout.group, frames), jnp.float32),
        ],
        [
            *_scratch(layout),
            pltpu.VMEM((layout.group, block, tile), jnp.float32),
            pltpu.VMEM((layout.group, block, tile), jnp.float32),
            pltpu.VMEM((block, tile), jnp.float32),
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table)


def _scratch(layout: Layout) -> list:
    """Memory of :func:`~speech_flax.kernels.tpu_layout.scores`."""
    tile, columns = layout.tile, layout.columns if layout.relative else layout.tile
    return [
        pltpu.VMEM((layout.group, tile, columns), jnp.float32),
        pltpu.VMEM((layout.group, 3, tile, tile), jnp.float32),
    ]


def backward(
    layout: Layout,
    query: Rows,
    key: Rows,
    value: Rows,
    mask: Float[Array, "batch 1 frames"],
    table: Float[Array, "table tile"],
    seeds: Int[Array, "batch heads"],
    lengths: Int[Array, "batch"],
    attended: Rows,
    logsumexp: Float[Array, "batch groups group frames"],
    cotangent: Rows,
    interpret: bool,
) -> tuple[Rows, Rows, Rows, Float[Array, "batch groups table tile"]]:
    """Gradients of queries, keys, values, and of the table for every row and group of heads."""
    batch, frames, lanes = query.shape
    tile, block, last = layout.tile, layout.block, layout.blocks - 1
    groups = lanes // tile
    queries = pl.BlockSpec((1, block, tile), lambda b, h, j, i, *_: (b, i, h))
    keys = pl.BlockSpec((1, block, tile), lambda b, h, j, i, *_: (b, j, h))
    sums = 3 if layout.relative else 1
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
            pl.BlockSpec(table.shape, lambda *_: (0, 0)),
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
            *_scratch(layout),
            pltpu.VMEM((layout.group, tile, layout.columns if layout.relative else tile), query.dtype),
            pltpu.VMEM((frames, tile), jnp.float32),
            pltpu.VMEM((sums, block, tile), jnp.float32),
            pltpu.VMEM((block, tile), jnp.float32),
            pltpu.VMEM(table.shape, jnp.float32),
            pltpu.VMEM((block, tile), query.dtype),
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table, attended, logsumexp, cotangent)
