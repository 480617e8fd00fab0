"""Flash attention (Dao et al. 2022) with the scores of relative keys computed inside, for TPUs.

The term of relative keys costs one product with the table of embeddings for each tile of queries; a strided roll moves
it to its place next to the diagonal. Nothing with both queries and keys leaves the chip. This module calls the kernels
of both directions.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from speech_flax.kernels.tpu_attention_backward import backward_kernel
from speech_flax.kernels.tpu_attention_forward import forward_kernel
from speech_flax.kernels.tpu_layout import Layout

#: Programs of different rows and heads are independent; those of one head share sums.
_SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
_MEMORY_LIMIT = 100 * 2**20

Rows = Float[Array, "batch frames lanes"]


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
        forward_kernel,
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
            _of_pairs(layout),
            pltpu.VMEM((layout.rows, tile), jnp.float32),
            _sides(layout),
            *[pltpu.VMEM((layout.tiles, layout.rows, lanes), jnp.float32) for lanes in (1, 1, tile)],
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table)


def _of_pairs(layout: Layout) -> pl.MemoryRef:
    """Memory for a tile of queries and all pairs of keys."""
    return pltpu.VMEM((layout.pairs, layout.rows, layout.pair), jnp.float32)


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
        backward_kernel,
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
            _of_pairs(layout),
            _of_pairs(layout),
            pltpu.VMEM((layout.rows, 1), jnp.float32),
            pltpu.VMEM((len(layout.near), layout.rows, tile), query.dtype),
            _sides(layout),
            pltpu.VMEM((places, block, tile), query.dtype),
            pltpu.VMEM((layout.padded, tile), jnp.float32),
            pltpu.VMEM((places, layout.tiles, tile, tile), jnp.float32),
            pltpu.VMEM((layout.tiles, tile, tile), jnp.float32),
            pltpu.VMEM(table.shape, jnp.float32),
        ],
        interpret,
    )(seeds, lengths, query, key, value, mask, table, reversed_table, attended, logsumexp, cotangent)
