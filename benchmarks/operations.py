"""Time of single operations, in the library's formulation and as they are defined, interleaved in one run.

    python benchmarks/operations.py [--seconds 10] [--rows 1] [--repeats 9] [--only attention]

Prints the median CPU time, over all threads, of every operation forward and forward with gradients; the median of
the ratios definition / library, above 1 where the library is faster; and the largest temporary memory of the programs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from speech_flax.kernels.attention import attend
from speech_flax.kernels.dropout import head_seeds
from speech_flax.kernels.fused_attention import fused_attention
from speech_flax.kernels.positions import RelativeKey
from speech_flax.layers.convolution import causal_depthwise_convolution
from speech_flax.layers.positional_convolution import grouped_convolution

Case = tuple[str, Callable, Callable, tuple[jax.Array, ...]]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape, np.float32))


def attention_cases(rows: int, frames: int) -> Iterator[Case]:
    mask = jnp.ones((rows, frames), bool)
    states = [normal(rows, frames, 16, 64) + index for index in range(3)]
    embeddings = normal(73, 64)
    seeds = head_seeds(jax.random.key(0), rows, 16)

    def definition(query, key, value, *embeddings, rate):
        positions = RelativeKey(*embeddings, 64) if embeddings else None
        by_head = (states.swapaxes(1, 2) for states in (query, key, value))
        return attend(*by_head, mask, positions, rate, seeds)[0].swapaxes(1, 2)

    def library(query, key, value, *embeddings, rate):
        positions = RelativeKey(*embeddings, 64) if embeddings else None
        return fused_attention(query, key, value, mask, positions, seeds, dropout_rate=rate)

    for name, operands, rate in (
        ("attention", states, 0.0),
        ("attention, relative key", [*states, embeddings], 0.0),
        ("attention, relative key, dropout", [*states, embeddings], 0.1),
    ):
        yield name, partial(definition, rate=rate), partial(library, rate=rate), tuple(operands)


def convolution_cases(rows: int, frames: int) -> Iterator[Case]:
    def grouped(inputs, kernel, groups, padding):
        return lax.conv_general_dilated(
            inputs, kernel, (1,), [padding], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
        )

    depthwise = partial(grouped, groups=1024, padding=(30, 0))
    inputs = normal(rows, frames, 1024)
    yield "convolution, depthwise", depthwise, causal_depthwise_convolution, (inputs, normal(31, 1, 1024))
    positional = partial(grouped, groups=16, padding=(64, 63))
    library = partial(grouped_convolution, groups=16, left=64)
    yield "convolution, positional", positional, library, (normal(rows, frames, 768), normal(128, 48, 768))


def with_gradients(function: Callable, operands: tuple[jax.Array, ...]) -> Callable:
    """The sum of squares and its gradients."""
    return jax.value_and_grad(lambda *inputs: jnp.square(function(*inputs)).sum(), argnums=tuple(range(len(operands))))


def measure(case: Case, repeats: int) -> None:
    name, definition, library, operands = case
    for direction in ("forward", "training"):
        functions = (definition, library)
        if direction == "training":
            functions = tuple(with_gradients(function, operands) for function in functions)
        programs = [jax.jit(function).lower(*operands).compile() for function in functions]
        times = np.empty((repeats, 2))
        for repeat in range(repeats):
            for index, program in enumerate(programs):
                start = time.process_time()
                jax.block_until_ready(program(*operands))
                times[repeat, index] = 1000 * (time.process_time() - start)
        before, after = np.median(times, axis=0)
        ratio = np.median(times[:, 0] / times[:, 1])
        memory = [round(program.memory_analysis().temp_size_in_bytes / 2**20) for program in programs]
        print(
            f"| {name} | {direction} | {before:.1f} | {after:.1f} | {ratio:.2f} | {memory[0]} | {memory[1]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the audio; 50 frames a second")
    parser.add_argument("--rows", type=int, default=1, help="utterances in the batch")
    parser.add_argument("--repeats", type=int, default=9, help="runs of every program")
    parser.add_argument("--only", default="", help="operations whose name starts like this")
    arguments = parser.parse_args()
    frames = round(50 * arguments.seconds) - 1
    print(f"float32, {arguments.rows} x {frames} frames, {jax.devices()[0].platform}, jax {jax.__version__}\n")
    print("| operation | direction | definition [ms] | library [ms] | ratio | definition [MiB] | library [MiB] |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cases in (attention_cases, convolution_cases):
        for case in cases(arguments.rows, frames):
            if case[0].startswith(arguments.only):
                measure(case, arguments.repeats)


if __name__ == "__main__":
    main()
