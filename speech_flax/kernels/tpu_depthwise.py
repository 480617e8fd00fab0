"""Depthwise convolution over frames on TPUs: sums of shifted frames in registers, with both gradients in one pass.

XLA computes such a convolution in a layout of its own, with copies before and after, and the gradient of the filters in
one pass over the states for every few taps. Here a program has one block of frames of some channels, in float32, and
reads it shifted by less than a register; shifts by whole registers cost nothing.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from speech_flax.kernels.tpu_layout import round_up

_LANES, _SUBLANES = 128, 8
#: Frames of the neighbouring block that a block sees; filters are one longer at most.
_HALO = 32
#: Frames that are summed at once: their sums stay in registers.
_AT_ONCE = 128
_LONGEST_BLOCK = 2048
_WIDEST_BLOCK = 512
_MEMORY_LIMIT = 64 * 2**20

States = Float[Array, "batch frames channels"]


def suits(width: int, channels: int) -> bool:
    """Whether the kernels can convolve with filters of this width."""
    return width <= _HALO + 1 and channels % _LANES == 0


class _Blocks:
    """How states are cut into blocks: of rows one by one, of channels and of frames."""

    def __init__(self, inputs: States):
        self.batch, self.frames, self.channels = inputs.shape
        self.length = min(round_up(self.frames, _AT_ONCE), _LONGEST_BLOCK)
        self.width = next(width for width in range(_WIDEST_BLOCK, 0, -_LANES) if self.channels % width == 0)
        self.count = pl.cdiv(self.frames, self.length)
        self.grid = (self.channels // self.width, self.batch, self.count)
        self.own = pl.BlockSpec((1, self.length, self.width), lambda c, b, i: (b, i, c))
        self.before = self._halo(lambda i: jnp.maximum(i * (self.length // _HALO) - 1, 0))
        last = pl.cdiv(self.frames, _HALO) - 1
        self.after = self._halo(lambda i: jnp.minimum((i + 1) * (self.length // _HALO), last))
        self.scratch = pltpu.VMEM((_HALO + self.length, _LANES), jnp.float32)

    def _halo(self, place: Callable[[Array], Array]) -> pl.BlockSpec:
        return pl.BlockSpec((1, _HALO, self.width), lambda c, b, i: (b, place(i), c))

    def filters(self, *leading: int) -> pl.BlockSpec:
        return pl.BlockSpec((*leading, self.width), lambda c, b, i: (*(0 for _ in leading), c))

    def existing(self, values: Array, first: int | Array) -> Float[Array, "rows lanes"]:
        """In float32, with zeros for what lies outside of the input; the first row is frame ``first``."""
        frame = first + lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where((frame >= 0) & (frame < self.frames), values.astype(jnp.float32), 0)

    def for_lanes(self, function: Callable[[pl.Slice], None]) -> None:
        """Call ``function`` for every 128 channels of a block."""

        def of_lanes(index: Array, _: None) -> None:
            function(pl.ds(pl.multiple_of(index * _LANES, _LANES), _LANES))

        lax.fori_loop(0, self.width // _LANES, of_lanes, None)

    def for_frames(self, function: Callable[[Array], None]) -> None:
        """Call ``function`` with the first of every ``_AT_ONCE`` frames of a block."""
        lax.fori_loop(0, self.length // _AT_ONCE, lambda i, _: function(pl.multiple_of(i * _AT_ONCE, _AT_ONCE)), None)


def _shifted(states_ref, first: Array, places: Iterable[int]) -> Iterable[tuple[int, Array]]:
    """``_AT_ONCE`` frames of ``states_ref`` from ``first + place`` on, for every place."""
    places = sorted(places, key=lambda place: (place % _SUBLANES, place))
    for shift in range(_SUBLANES):
        own = [place for place in places if place % _SUBLANES == shift]
        if own:
            window = states_ref[pl.ds(first + shift, own[-1] - shift + _AT_ONCE)]
            for place in own:
                yield place, window[place - shift : place - shift + _AT_ONCE]


def _weighted_sum(states_ref, first: Array, taps_ref, lanes: pl.Slice, taps: dict[int, int]) -> Array:
    """Sum over places of shifted frames times the filters' taps; ``taps`` says which belongs to a place."""
    total = jnp.zeros((_AT_ONCE, _LANES), jnp.float32)
    for place, states in _shifted(states_ref, first, taps):
        tap = taps[place]
        total += states * taps_ref[tap : tap + 1, lanes]
    return total


def _forward_kernel(taps_ref, before_ref, inputs_ref, outputs_ref, padded_ref, *, blocks: _Blocks):
    width, start = taps_ref.shape[0], pl.program_id(2) * blocks.length
    taps = {_HALO - width + 1 + tap: tap for tap in range(width)}

    def of_lanes(lanes: pl.Slice) -> None:
        padded_ref[:_HALO] = blocks.existing(before_ref[0, :, lanes], start - _HALO)
        padded_ref[_HALO:] = blocks.existing(inputs_ref[0, :, lanes], start)

        def of_frames(first: Array) -> None:
            total = _weighted_sum(padded_ref, first, taps_ref, lanes, taps)
            outputs_ref[0, pl.ds(first, _AT_ONCE), lanes] = total.astype(outputs_ref.dtype)

        blocks.for_frames(of_frames)

    blocks.for_lanes(of_lanes)


def _backward_kernel(
    taps_ref, before_ref, inputs_ref, cotangent_ref, after_ref, of_inputs_ref, of_taps_ref, padded_ref, cotangents_ref,
    *, blocks: _Blocks,
):  # fmt: skip
    width, start = taps_ref.shape[0], pl.program_id(2) * blocks.length
    seen = {_HALO - width + 1 + tap: tap for tap in range(width)}
    sent = {width - 1 - tap: tap for tap in range(width)}

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        of_taps_ref[...] = jnp.zeros(of_taps_ref.shape, jnp.float32)

    def of_lanes(lanes: pl.Slice) -> None:
        padded_ref[:_HALO] = blocks.existing(before_ref[0, :, lanes], start - _HALO)
        padded_ref[_HALO:] = blocks.existing(inputs_ref[0, :, lanes], start)
        cotangents_ref[: blocks.length] = blocks.existing(cotangent_ref[0, :, lanes], start)
        cotangents_ref[blocks.length :] = blocks.existing(after_ref[0, :, lanes], start + blocks.length)

        def of_frames(first: Array) -> None:
            total = _weighted_sum(cotangents_ref, first, taps_ref, lanes, sent)
            of_inputs_ref[0, pl.ds(first, _AT_ONCE), lanes] = total.astype(of_inputs_ref.dtype)
            cotangent = cotangents_ref[pl.ds(first, _AT_ONCE)]
            for place, states in _shifted(padded_ref, first, seen):
                products = (states * cotangent).reshape(-1, _SUBLANES, _LANES)
                of_taps_ref[seen[place], :, lanes] += products.sum(0)

        blocks.for_frames(of_frames)

    blocks.for_lanes(of_lanes)


def _parameters(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_MEMORY_LIMIT)


def _cost(inputs: States, times: int) -> pl.CostEstimate:
    """Nothing for the matrix units; the states read and written ``times`` times."""
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=times * inputs.size * inputs.dtype.itemsize)


def forward(inputs: States, taps: Float[Array, "width channels"], *, interpret: bool = False) -> States:
    """``output[t] = sum over k of inputs[t + k - width + 1] * taps[k]``, summed in float32."""
    blocks = _Blocks(inputs)
    return pl.pallas_call(
        lambda *refs: _forward_kernel(*refs, blocks=blocks),
        grid=blocks.grid,
        in_specs=[blocks.filters(taps.shape[0]), blocks.before, blocks.own],
        out_specs=blocks.own,
        out_shape=jax.ShapeDtypeStruct(inputs.shape, inputs.dtype),
        scratch_shapes=[blocks.scratch],
        compiler_params=_parameters("parallel", "parallel", "parallel"),
        cost_estimate=_cost(inputs, 2),
        interpret=interpret,
    )(taps.astype(jnp.float32), inputs, inputs)


def backward(
    inputs: States, cotangent: States, taps: Float[Array, "width channels"], *, interpret: bool = False
) -> tuple[States, Float[Array, "width channels"]]:
    """Gradients of the inputs, in their type, and of the taps, in float32, for the cotangent of the outputs."""
    blocks, width = _Blocks(inputs), taps.shape[0]
    of_inputs, of_taps = pl.pallas_call(
        lambda *refs: _backward_kernel(*refs, blocks=blocks),
        grid=blocks.grid,
        in_specs=[blocks.filters(width), blocks.before, blocks.own, blocks.own, blocks.after],
        out_specs=[blocks.own, blocks.filters(width, _SUBLANES)],
        out_shape=[
            jax.ShapeDtypeStruct(inputs.shape, inputs.dtype),
            jax.ShapeDtypeStruct((width, _SUBLANES, blocks.channels), jnp.float32),
        ],
        scratch_shapes=[blocks.scratch, blocks.scratch],
        compiler_params=_parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=_cost(inputs, 3),
        interpret=interpret,
    )(taps.astype(jnp.float32), inputs, inputs, cotangent, cotangent)
    return of_inputs, of_taps.sum(1)
