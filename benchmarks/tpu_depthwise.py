"""Depthwise convolution on TPUs, by XLA and by the library's kernels: estimated times, without a TPU.

    python benchmarks/tpu_depthwise.py [--slices v5e:2x2 v5p:2x2x1 v6e:2x2] [--rows 16] [--seconds 20.4]

Compiles both directions for one chip of each slice, with filters as w2v-bert-2.0 has them and bfloat16, and prints a
table in milliseconds of one layer, by the method of the detailed preflight: of every instruction, copies included, the
longest of its cycles and its traffic with the main memory. An estimate.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tpu_attention import slices_and_sizes

from speech_flax.layers import convolution
from speech_flax.training.bundles import read_cycles
from speech_flax.training.estimate import estimate
from speech_flax.training.hlo import parse_program
from speech_flax.training.tpu_slices import Slice, parse_slice, prepare_compiler, slice_devices

CHANNELS, WIDTH = 1024, 31
FORMULATIONS = {
    "XLA's convolution, gradient of the filters by shifts": (
        convolution._padded_correlation,
        convolution._gradients_by_shifts,
    ),
    "kernels": (convolution._forward_on_tpu, convolution._gradients_on_tpu),
}


def milliseconds(function: Callable, slice_: Slice, rows: int, frames: int, backward: bool, dumps: Path) -> float:
    """One run of a formulation of one direction."""
    sharding = SingleDeviceSharding(slice_devices(slice_)[0])
    states = jax.ShapeDtypeStruct((rows, frames, CHANNELS), jnp.bfloat16, sharding=sharding)
    kernel = jax.ShapeDtypeStruct((WIDTH, 1, CHANNELS), jnp.bfloat16, sharding=sharding)
    for file in dumps.glob("*.txt"):  # of the program before, whose instructions may have the same names
        file.unlink()

    def run(*operands):  # neighbours that use no convolution's layout, as norms and gates are
        return jax.tree.map(jnp.tanh, function(*(jnp.tanh(operand) for operand in operands)))

    operands = (states, kernel, states) if backward else (states, kernel)
    jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
    program = next(dumps.glob("*run*.after_optimizations_after_buffer_assignment.txt")).read_text()
    total = estimate(parse_program(program), slice_, read_cycles(dumps))
    around = sum(cost.seconds for cost in total.costs if cost.instruction.op_name.endswith("/tanh"))
    return (total.seconds - around) * 1e3


def main() -> None:
    slices, rows, frames = slices_and_sizes(__doc__)
    print(f"{rows} rows of {frames} frames, {CHANNELS} filters of {WIDTH}, bfloat16\n")
    print("| depthwise convolution | chip | forward [ms] | backward [ms] |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        dumps = Path(directory)
        prepare_compiler(programs=dumps, machine_code=dumps)
        for name, directions in FORMULATIONS.items():
            for slice_ in map(parse_slice, slices):
                times = [
                    milliseconds(function, slice_, rows, frames, bool(number), dumps)
                    for number, function in enumerate(directions)
                ]
                print(f"| {name} | {slice_.chip.name} | {times[0]:.2f} | {times[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
