"""Before a slice is rented: compile every training step for it on this machine, and say what it takes.

``train.py --config C --preflight v5e:16x16`` compiles the same program that training compiles, with the TPU compiler
and without a TPU.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speech_flax.configuration import HubertConfig
from speech_flax.training.estimate import Estimate, estimate
from speech_flax.training.experiment import Experiment
from speech_flax.training.flops import training_flops
from speech_flax.training.hlo import parse_program
from speech_flax.training.preflight_plan import BucketShape, PreflightPlan, plan_preflight
from speech_flax.training.programs import Programs, training_programs
from speech_flax.training.sharding import check_heads, make_mesh
from speech_flax.training.step_compiler import compile_step
from speech_flax.training.tpu_slices import Slice, prepare_compiler, slice_devices


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip: what is used at the peak, and by what; ``temporaries`` are gradients and activations."""

    usable: int
    peak: int
    parameters: int
    optimizer: int
    batch: int

    @property
    def temporaries(self) -> int:
        return max(0, self.peak - self.parameters - self.optimizer - self.batch)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


@dataclasses.dataclass(frozen=True)
class BucketReport:
    """What the step of one bucket takes. Times are seconds; without them the program does not fit."""

    shape: BucketShape
    rows_per_chip: float
    memory: Memory
    largest_rows_per_chip: int
    compile_seconds: float
    step_seconds: float | None = None
    audio_seconds_per_second_per_chip: float | None = None
    utilisation: float | None = None
    seconds_by_bound: dict[str, float] = dataclasses.field(default_factory=dict)
    communication_seconds: float = 0.0
    exposed_communication_seconds: float = 0.0
    communications: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    costliest: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The whole report, of one experiment on one slice."""

    slice_name: str
    num_chips: int
    mesh: dict[str, int]
    parameters: int
    remat: str
    dtype: str
    accumulation: int
    steps: int
    detailed: bool
    buckets: list[BucketReport]
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        return all(bucket.memory.fits for bucket in self.buckets)

    @property
    def hours(self) -> float | None:
        """Of all configured steps; ``None`` when a bucket does not fit."""
        if not self.fits:
            return None
        return self.steps * sum(bucket.shape.share * bucket.step_seconds for bucket in self.buckets) / 3600


def preflight(experiment: Experiment, slice_: Slice, *, detailed: bool = False, say=lambda text: None) -> Preflight:
    """Compile the training step of every bucket of ``experiment`` for ``slice_``.

    This process can compute on the CPU alone from then on.

    Args:
        detailed: Have the compiler dump its final instructions and count their cycles: several times slower.
        say: Gets a line of progress for every bucket.

    Raises:
        SliceError: the slice does not exist, or the TPU compiler is not installed.
        ExperimentError, ShardingError: for what is wrong with the experiment.
        StepCompilerError: when the compiler refuses a program for another reason than its size.
    """
    prepare_compiler()
    mesh = make_mesh(experiment.mesh, slice_devices(slice_))
    plan = plan_preflight(experiment, mesh)
    check_heads(mesh, plan.task.model.config.num_attention_heads)
    programs = training_programs(experiment, plan.task, mesh)
    reporter = _BucketReporter(experiment, slice_, plan, programs, detailed)
    buckets = []
    for shape in plan.buckets:
        say(f"compiling {shape.rows} x {shape.max_seconds:g} s for {slice_.name}")
        buckets.append(reporter.report(shape))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(programs.abstract_state.params))
    return Preflight(
        slice_.name,
        slice_.num_chips,
        dict(mesh.shape),
        parameters,
        experiment.model.remat,
        experiment.model.dtype,
        experiment.accumulation,
        experiment.steps,
        detailed,
        buckets,
        plan.assumptions,
    )


def bytes_per_chip(tree: Any) -> int:
    """Of abstract arrays with shardings: what each device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def largest_rows(memory: Memory, rows: float, fixed: int, usable_share: float = 0.97) -> int:
    """Rows per chip that fit, if memory beyond ``fixed`` bytes grows in proportion to them; 0 when none does.

    Args:
        rows: Rows per chip that take ``memory``.
        fixed: Bytes that do not depend on the rows: parameters, moments and gradients.
        usable_share: A little is left free, for what is not in proportion.
    """
    per_row = max(memory.peak - fixed, 1) / rows
    return max(0, int((memory.usable * usable_share - fixed) / per_row))


class _BucketReporter:
    """Has the step of one bucket after another compiled, and looks at what comes out."""

    def __init__(self, experiment: Experiment, slice_: Slice, plan: PreflightPlan, programs: Programs, detailed: bool):
        self.experiment = experiment
        self.slice = slice_
        self.plan = plan
        self.detailed = detailed
        self.parameters = bytes_per_chip(programs.abstract_state.params)
        self.optimizer = bytes_per_chip(programs.abstract_state.optimizer)
        self.trained = programs.trained()

    def report(self, shape: BucketShape) -> BucketReport:
        """Compile for one shape.

        Raises:
            StepCompilerError: when the compiler refuses the program for another reason than its size.
        """
        began = time.monotonic()
        compiled = compile_step(self.experiment, self.slice, shape, machine_code=self.detailed)
        seconds = time.monotonic() - began
        rows = shape.rows / self.slice.num_chips
        batch = int(rows * (round(shape.max_seconds * 16_000) + shape.max_labels) * 4)
        usable = int(self.slice.chip.memory_bytes)
        memory = Memory(usable, compiled.peak_bytes, self.parameters, self.optimizer, batch)
        most = largest_rows(memory, rows, 2 * self.parameters + self.optimizer)
        report = BucketReport(shape, rows, memory, most, seconds)
        if not compiled.text:
            return report
        return self._with_times(report, estimate(parse_program(compiled.text), self.slice, compiled.cycles))

    def _with_times(self, report: BucketReport, estimated: Estimate) -> BucketReport:
        shape, task = report.shape, self.plan.task
        samples = round(shape.max_seconds * 16_000)
        stride = 1 if isinstance(task.model.config, HubertConfig) else task.front_end.stride
        flops = training_flops(task.model.config, shape.rows, samples, stride, self.trained)
        per_chip = flops / self.slice.num_chips
        return dataclasses.replace(
            report,
            step_seconds=estimated.seconds,
            audio_seconds_per_second_per_chip=report.rows_per_chip * shape.max_seconds / estimated.seconds,
            utilisation=per_chip / (estimated.seconds * self.slice.chip.matmul_flops),
            seconds_by_bound=estimated.by_bound,
            communication_seconds=sum(c.seconds for c in estimated.communications),
            exposed_communication_seconds=sum(c.exposed for c in estimated.communications),
            communications=estimated.summed_communications(),
            costliest=estimated.costliest(),
            unknown=estimated.unknown,
        )
