"""Compiles one training step for a TPU slice in a process of its own.

The TPU compiler optimises, schedules and places a program in memory first, and writes machine code for it then, which
takes most of the time. All but the cycles of ``--detailed`` is known after the first part: the process is ended there.
"""

import dataclasses
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from speech_flax.training.bundles import read_cycles
from speech_flax.training.experiment import Experiment
from speech_flax.training.preflight_plan import BucketShape, empty_batch, plan_preflight
from speech_flax.training.programs import Programs, training_programs
from speech_flax.training.sharding import make_mesh
from speech_flax.training.tpu_slices import Slice, prepare_compiler, slice_devices

_PROGRAM = "*train_step*.after_optimizations_after_buffer_assignment.txt"
_MEMORY = "*train_step*.after_optimizations-memory-usage-report.txt"
_ERROR = "error.txt"
_POLL_SECONDS = 0.5


class StepCompilerError(ValueError):
    """A program that the TPU compiler refuses for another reason than its size."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The scheduled program as text, empty if it does not fit; the bytes of memory per chip that it takes or would
    take; and cycles by instruction where machine code was made."""

    text: str
    peak_bytes: int
    cycles: dict[str, int] | None


def compile_step(
    experiment: Experiment,
    slice_: Slice,
    shape: BucketShape,
    *,
    machine_code: bool,
    compiler: Callable[..., None] | None = None,
) -> CompiledStep:
    """Compile the training step of one shape of batch.

    Args:
        machine_code: Go on to the end, and count cycles.
        compiler: What the other process runs, :func:`compile_here` after changes of its own, to compare formulations.

    Raises:
        StepCompilerError: when the compiler refuses the program for another reason than its size, or crashes.
    """
    with tempfile.TemporaryDirectory(prefix="speech_flax_preflight") as name:
        directory = Path(name)
        arguments = (experiment, slice_, shape, directory, machine_code)
        process = multiprocessing.get_context("spawn").Process(
            target=compiler or compile_here, args=arguments, daemon=True
        )
        process.start()
        try:
            program = _await_program(process, directory, machine_code)
        finally:
            process.kill()
            process.join()
        if program is None:
            return CompiledStep("", _refused_bytes(directory, shape), None)
        peak = placed_bytes(next(directory.glob(_MEMORY)).read_text())
        cycles = read_cycles(directory) if machine_code else None
        return CompiledStep(program.read_text(), peak, cycles)


def compile_here(
    experiment: Experiment, slice_: Slice, shape: BucketShape, directory: Path, machine_code: bool
) -> None:  # fmt: skip
    """What the process does: compile, and leave what comes out, or an error, in ``directory``."""
    try:
        prepare_compiler(programs=directory, machine_code=directory if machine_code else None)
        mesh = make_mesh(experiment.mesh, slice_devices(slice_))
        plan = plan_preflight(experiment, mesh)
        programs: Programs = training_programs(experiment, plan.task, mesh)
        programs.compile(empty_batch(shape, plan.task, mesh), training=True)
    except Exception as error:  # whatever it is, the other process reports it
        (directory / _ERROR).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def _await_program(process: BaseProcess, directory: Path, machine_code: bool) -> Path | None:
    """The file of the program once it is written, with machine code once the process has ended; ``None`` on failure."""
    size = -1
    while process.is_alive():
        time.sleep(_POLL_SECONDS)
        if not machine_code and (found := next(directory.glob(_PROGRAM), None)) is not None:
            before, size = size, found.stat().st_size
            if before == size:
                return found
    return next(directory.glob(_PROGRAM), None) if process.exitcode == 0 else None


def _refused_bytes(directory: Path, shape: BucketShape) -> int:
    error = directory / _ERROR
    message = error.read_text() if error.exists() else "it crashed"
    refused = refused_memory(message)
    if refused is None:
        reason = " ".join(message.split())[:300]
        raise StepCompilerError(f"the TPU compiler refuses {shape.rows} x {shape.max_seconds:g} s: {reason}")
    return refused


def refused_memory(message: str) -> int | None:
    """Bytes that a program would need at least, from the compiler's message that it does not fit; ``None`` for other
    errors. One of its two messages gives the temporary arrays alone."""
    temporaries = r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM"
    found = re.search(rf"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|{temporaries}", message)
    if found is None:
        return None
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[found.group(2) or found.group(4) or ""]
    return int(float(found.group(1) or found.group(3)) * scale)


def placed_bytes(report: str) -> int:
    """Bytes of main memory that hold all arrays of a program, from the compiler's report on its memory."""
    return int(re.search(r"Memory Space: default[^\n]*\s+Total bytes: (\d+)", report).group(1))
