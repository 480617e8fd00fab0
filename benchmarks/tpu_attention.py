"""The attention kernels on TPUs: time by the cycles of the compiler's final instructions, without a TPU.

    python benchmarks/tpu_attention.py [--slices v5e:2x2 v5p:2x2x1 v6e:2x2] [--rows 16] [--seconds 20.4]

Compiles both passes for one chip of each slice, with heads as w2v-bert-2.0 has them and bfloat16, and prints a table in
milliseconds of one layer. Every loop body counts as often as it runs; waiting for memory is not counted. An estimate.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from speech_flax.kernels.flash_attention import FlashAttention
from speech_flax.training.bundles import read_cycles
from speech_flax.training.tpu_slices import parse_slice, prepare_compiler, slice_devices

HEADS, HEAD_SIZE, LEFT, RIGHT = 16, 64, 64, 8
CASES = {"without positions": (False, 0.0), "relative key": (True, 0.0), "relative key, dropout 0.1": (True, 0.1)}


def cycles(direction: str, device: jax.Device, rows: int, frames: int, relative: bool, rate: float, dumps: Path) -> int:
    """Cycles of the kernel of one direction."""
    sharding = SingleDeviceSharding(device)

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    states = array(rows, frames, HEADS, HEAD_SIZE)
    mask, seeds = array(rows, frames, dtype=jnp.bool_), array(rows, HEADS, dtype=jnp.int32)
    operands = [states, states, states, mask, array(LEFT + RIGHT + 1, HEAD_SIZE) if relative else None, seeds]
    if direction == "backward":
        operands += [states, array(rows, HEADS, frames, dtype=jnp.float32), states]
    before = set(read_cycles(dumps))
    formulation = FlashAttention(LEFT if relative else None, rate)
    name = f"{direction}_{len(before)}"

    def run(*operands):
        return getattr(formulation, direction)(*operands)

    run.__name__ = name
    jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",)).compile()
    return max(count for instruction, count in read_cycles(dumps).items() if instruction not in before)


def slices_and_sizes(description: str) -> tuple[list[str], int, int]:
    """What the command line says: names of slices, rows, and frames of each."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--slices", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.4)
    arguments = parser.parse_args()
    return arguments.slices, arguments.rows, int(arguments.seconds * 50)


def main() -> None:
    slices, rows, frames = slices_and_sizes(__doc__)
    print(f"{rows} rows of {frames} frames, {HEADS} heads of {HEAD_SIZE}, bfloat16\n")
    print("| attention | chip | forward [ms] | backward [ms] |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        dumps = Path(directory)
        prepare_compiler(machine_code=dumps)
        for case, (relative, rate) in CASES.items():
            for name in slices:
                slice_ = parse_slice(name)
                device = slice_devices(slice_)[0]
                counts = [
                    cycles(direction, device, rows, frames, relative, rate, dumps)
                    for direction in ("forward", "backward")
                ]
                times = " | ".join(f"{count / slice_.chip.clock * 1e3:.2f}" for count in counts)
                print(f"| {case} | {name.split(':')[0]} | {times} |", flush=True)


if __name__ == "__main__":
    main()
