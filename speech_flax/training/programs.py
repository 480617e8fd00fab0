"""The compiled programs of a run: one training and one evaluation step per length bucket."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from speech_flax.data.loader import Batch
from speech_flax.layers.collectives import compiler_options
from speech_flax.training.experiment import Experiment
from speech_flax.training.optimizer import Optimizer
from speech_flax.training.progress import say
from speech_flax.training.sharding import batch_sharding, process_shard, state_shardings, to_global
from speech_flax.training.step import StepMetrics, TrainState, evaluation_step, train_step
from speech_flax.training.task import RowResults, Task, initial_parameters


def use_compilation_cache(directory: str | None) -> None:
    """Keep compiled programs in ``directory`` from run to run."""
    if directory is not None:
        path = Path(os.path.expandvars(directory)).expanduser() / "programs"
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def device_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays of a batch that the device needs."""
    names = ("waveforms", "sample_lengths", "labels", "label_lengths", "valid")
    return {name: getattr(batch, name) for name in names}


class Programs:
    """Training state and steps over one mesh, compiled ahead of time for each shape of batch."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        seed: int,
        accumulation: int = 1,
        spike_factor: float = 0.0,
    ):
        self.mesh = mesh
        self._create = partial(self._random_state, task, optimizer, seed)
        with jax.set_mesh(mesh):  # as in `initial_state`, which then need not trace it again
            abstract = jax.eval_shape(self._create)
        self._shardings = state_shardings(abstract, mesh)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self._shardings,
        )
        self._optimizer = optimizer
        step = partial(
            train_step,
            task=task,
            optimizer=optimizer,
            seed=seed,
            accumulation=accumulation,
            spike_factor=spike_factor,
        )
        jit = partial(jax.jit, compiler_options=compiler_options(mesh.devices.flat[0].device_kind, mesh.size))
        everywhere = NamedSharding(mesh, PartitionSpec())
        results = (self._shardings, everywhere)
        self._jitted = {
            "train": jit(step, donate_argnums=0, out_shardings=results),
            "train head": jit(partial(step, head_only=True), donate_argnums=0, out_shardings=results),
            "evaluate": jit(partial(evaluation_step, task=task), out_shardings=batch_sharding(mesh)),
        }
        self.head_only_steps = optimizer.settings.head_only_steps
        self._compiled: dict[tuple, Future[jax.stages.Compiled]] = {}
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")

    @staticmethod
    def _random_state(task: Task, optimizer: Optimizer, seed: int) -> TrainState:
        return TrainState.create(initial_parameters(task, jax.random.key(seed)), optimizer)

    def initial_state(self, pretrained: PyTree | None = None) -> TrainState:
        """The state before step 0; every array is born on the devices that hold it."""
        with jax.set_mesh(self.mesh):
            if pretrained is None:
                return jax.jit(self._create, out_shardings=self._shardings)()
            params = self.place(pretrained)
            create = partial(TrainState.create, optimizer=self._optimizer)
            return jax.jit(create, out_shardings=self._shardings)(params)

    def place(self, params: PyTree) -> PyTree:
        """Parameters, which every process holds whole, on the devices; all that :meth:`predict` needs."""
        return jax.tree.map(_in_shards, params, self._shardings.params)

    def trained(self) -> list[str]:
        """Paths of the parameters that are trained."""
        return self._optimizer.trained(self.abstract_state.params)

    def compile(self, batch: Batch, *, training: bool, head_only: bool = False) -> jax.stages.Compiled:
        """The program for batches of this shape; compiled at the first call, or by :meth:`compile_ahead`."""
        key, compilation = self._compilation(batch, training, head_only)
        if key not in self._compiled:
            ready: Future[jax.stages.Compiled] = Future()
            ready.set_result(compilation())
            self._compiled[key] = ready
        return self._compiled[key].result()

    def compile_ahead(self, what: str, batch: Batch, *, training: bool, head_only: bool = False) -> None:
        """Compile a program in a thread, after those that it was given before; the terminal then says ``what``."""
        key, compilation = self._compilation(batch, training, head_only)
        if key not in self._compiled:  # a shape that several splits share is compiled once
            self._compiled[key] = self._compiler.submit(_announced, what, compilation)

    def ready(self, batch: Batch, *, training: bool, head_only: bool = False) -> bool:
        """Whether :meth:`compile` has the program and returns at once."""
        key, _ = self._compilation(batch, training, head_only)
        return key in self._compiled and self._compiled[key].done()

    def wait(self, batch: Batch, alive: Callable[[], None], *, training: bool, head_only: bool = False) -> None:
        """Until :meth:`compile` has the program; ``alive`` is called after every program that is compiled before."""
        key, _ = self._compilation(batch, training, head_only)
        names = list(self._compiled)  # in the order in which they are compiled
        for name in names[: names.index(key)] if key in names else ():
            self._compiled[name].result()
            alive()
        self.compile(batch, training=training, head_only=head_only)

    def check_ahead(self) -> None:
        """Raise what went wrong in :meth:`compile_ahead`, though nobody has asked for that program yet."""
        for future in self._compiled.values():
            if future.done():
                future.result()

    def abandon_ahead(self) -> None:
        """Compile nothing more of what was to be compiled ahead, but for what is being compiled."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _compilation(
        self, batch: Batch, training: bool, head_only: bool
    ) -> tuple[tuple, Callable[[], jax.stages.Compiled]]:
        """Name and shapes of a program, and a function that compiles it."""
        arrays = device_arrays(batch)
        program = ("train head" if head_only else "train") if training else "evaluate"

        def compilation() -> jax.stages.Compiled:
            sharding, processes = batch_sharding(self.mesh), process_shard(self.mesh)[1]
            abstract = {
                name: jax.ShapeDtypeStruct((rows.shape[0] * processes, *rows.shape[1:]), rows.dtype, sharding=sharding)
                for name, rows in arrays.items()
            }
            state = self.abstract_state if training else self.abstract_state.params
            with jax.set_mesh(self.mesh):
                return self._jitted[program].lower(state, abstract).compile()

        return (program, *(array.shape for array in arrays.values())), compilation

    def train(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """One step; returns before the devices have finished it."""
        compiled = self.compile(batch, training=True, head_only=batch.step < self.head_only_steps)
        return compiled(state, to_global(device_arrays(batch), self.mesh))

    def predict(self, params: PyTree, batch: Batch) -> RowResults:
        """Predictions and losses of one batch."""
        return self.compile(batch, training=False)(params, to_global(device_arrays(batch), self.mesh))


def training_programs(experiment: Experiment, task: Task, mesh: Mesh) -> Programs:
    """The programs that ``experiment`` trains with."""
    return Programs(
        task,
        Optimizer(experiment.optimizer, experiment.steps, experiment.model.frozen),
        mesh,
        seed=experiment.seed,
        accumulation=experiment.accumulation,
        spike_factor=experiment.optimizer.spike_factor,
    )


def _announced(what: str, compilation: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
    began = time.monotonic()
    compiled = compilation()
    say(f"compiled {what} in {time.monotonic() - began:.1f} s")
    return compiled


def _in_shards(array: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, with no device ever holding more than its shard."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def parameter_count(params: PyTree) -> int:
    """Number of trained scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
