"""One measurement of ``growth.py`` on the CPU, in a process of its own.

    python benchmarks/growth_sides.py CASE_AS_JSON [--plain] [--unroll] [--compile]

Prints one JSON object: seconds to trace and lower, seconds to compile, GiB that the program needs by the compiler's
count and, unless it only compiles or this machine has too little memory, seconds of a run and its highest memory:
parameters and what the libraries that XLA calls allocate are in it, the idle process is not.
"""

import argparse
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from cpu_sides import Case, inputs, lower_ours, our_model, our_run, random_parameters, resident

#: Share of the free memory that a program may take; above it, it is not run.
USABLE = 0.85
#: Runs are repeated, and the fastest counts, until they have taken so long.
SECONDS = 4.0


def free_memory() -> int:
    """Bytes that programs can still have on this machine."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def use_plain_attention() -> None:
    """Have the models compute attention by its definition, with a tensor of all queries by all keys."""
    import speech_flax.layers.attention as layers
    from speech_flax.kernels.attention import attend

    def plain(query, key, value, mask, positions=None, seeds=None, *, dropout_rate=0.0):
        by_head = (states.swapaxes(1, 2) for states in (query, key, value))
        return attend(*by_head, mask, positions, dropout_rate, seeds)[0].swapaxes(1, 2)

    layers.fused_attention = plain


def measure(case: Case, *, plain: bool, unroll: bool, run: bool) -> dict[str, Any]:
    """What is printed."""
    import jax
    import jax.numpy as jnp

    import speech_flax.models.hubert
    import speech_flax.models.wav2vec2_bert  # noqa: F401

    jax.devices()
    if plain:
        use_plain_attention()
    module, params = our_model(case, scan_unroll=case.layers if unroll else 1)
    given = {name: jnp.asarray(array) for name, array in inputs(case).items()}
    times = [time.perf_counter()]
    lowered = lower_ours(case, module, params, given)
    times.append(time.perf_counter())
    program = lowered.compile()
    times.append(time.perf_counter())
    placed = program.memory_analysis()
    needed = placed.argument_size_in_bytes + placed.output_size_in_bytes + placed.temp_size_in_bytes
    result = {"lowering_s": times[1] - times[0], "compilation_s": times[2] - times[1], "needed_gib": needed / 2**30}
    if not run or needed > USABLE * free_memory():
        return result
    gc.collect()
    idle = resident("VmRSS")
    used = resident("VmData")
    resource.setrlimit(
        resource.RLIMIT_DATA, (used + int(USABLE * free_memory()),) * 2
    )  # or others are killed for memory
    step = our_run(case, program, random_parameters(params), given)
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here on
    walls = []
    try:
        while sum(walls) < SECONDS:
            began = time.perf_counter()
            step()
            walls.append(time.perf_counter() - began)
    except jax.errors.JaxRuntimeError:  # libraries that XLA calls need more than it counts
        return result
    return result | {"step_s": min(walls), "peak_gib": (resident("VmHWM") - idle) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--unroll", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    case = Case(**json.loads(options.case))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-case.threads :])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but the answer on the standard output
    result = measure(case, plain=options.plain, unroll=options.unroll, run=not options.compile)
    print(json.dumps({name: round(value, 3) for name, value in result.items()}), file=answers, flush=True)
    sys.exit()


if __name__ == "__main__":
    main()
