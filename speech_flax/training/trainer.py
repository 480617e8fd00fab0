"""The loop over steps, with its interruptions: logging, evaluation, checkpoints, and the request to stop."""

import logging
from collections.abc import Iterator
from typing import Any

import jax

from speech_flax.data.loader import Batch, BatchLoader
from speech_flax.data.plan import EMPTY_ROW
from speech_flax.data.stream_loader import StreamLoader
from speech_flax.training.checkpoints import Checkpoints
from speech_flax.training.corpus import Split
from speech_flax.training.evaluation import Evaluation, describe, evaluate
from speech_flax.training.experiment import Experiment
from speech_flax.training.goodput import Clock
from speech_flax.training.metrics_log import MetricsLog
from speech_flax.training.processes import StopRequest
from speech_flax.training.profiling import ProfilerTrace
from speech_flax.training.programs import Programs
from speech_flax.training.progress import Progress, say
from speech_flax.training.run_directory import RunDirectory
from speech_flax.training.step import StepMetrics, TrainState
from speech_flax.training.stream_corpus import StreamSplit
from speech_flax.training.task import Task
from speech_flax.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

#: Utterances after which the share of bad files says something.
_ROWS_BEFORE_BAD_SHARE = 20


class TrainingError(ValueError):
    """A run that cannot go on: too many bad files, or too many steps skipped in a row."""


class Stopped(Exception):
    """The run was asked to stop while nothing was left to be saved."""


class Trainer:
    """What a run holds while it goes. ``stop`` is polled and ``watchdog`` told at every step."""

    def __init__(
        self,
        experiment: Experiment,
        run: RunDirectory,
        splits: dict[str, Split | StreamSplit],
        loaders: dict[str, BatchLoader | StreamLoader],
        task: Task,
        programs: Programs,
        checkpoints: Checkpoints,
        stop: StopRequest,
        watchdog: Watchdog,
    ):
        self.experiment = experiment
        self.run_directory = run
        self.splits = splits
        self.loaders = loaders
        self.task = task
        self.programs = programs
        self.checkpoints = checkpoints
        self.stop = stop
        self.watchdog = watchdog
        self.clock = Clock()
        self.rows_seen = 0
        self.bad_rows = 0
        self.bad_files: list[str] = []
        self._to_validate = False

    def initial_state(self, pretrained: Any) -> TrainState:
        """The newest checkpoint's state, or the state before step 0."""
        restored = self.checkpoints.restore_newest(self.programs.abstract_state)
        if restored is None:
            return self.programs.initial_state(pretrained)
        state, progress = restored
        self.clock = Clock(progress["clock"])
        self.rows_seen, self.bad_rows = progress["rows_seen"], progress["bad_rows"]
        self.bad_files = progress["bad_files"]
        self._to_validate = progress["to_validate"]
        self.loaders["train"].restore(progress["position"])
        say(f"continuing at step {int(state.step)} from {self.run_directory.checkpoints}")
        return state

    def run(self, state: TrainState) -> TrainState:
        """Train until the last step, or until a request to stop; the last state is saved.

        Raises:
            TrainingError: when too many files are bad or too many steps are skipped in a row.
            Stopped: when asked to stop before the first step.
        """
        experiment, first = self.experiment, int(state.step)
        if first >= experiment.steps:
            return state
        batches = self._timed(self.loaders["train"].batches(first, experiment.steps - first))
        log = self.open_log(first)
        progress = Progress(
            steps=experiment.steps,
            first_step=first,
            plan=self.splits["train"].plan,
            log=log,
            log_every=experiment.log_every,
            evaluate_every=experiment.evaluate_every if "validation" in self.splits else None,
            clock=self.clock,
        )
        trace = ProfilerTrace(experiment.profile_steps, self.run_directory.profile)
        try:
            if self._to_validate:  # it was asked to stop before it had
                self._validate(first, state, progress)
            for batch in batches:
                step = batch.step + 1
                self._await_program(batch, progress)
                if batch.step == first and self.stop():
                    raise Stopped
                trace.before(step)
                state, metrics = self.programs.train(state, batch)
                trace.after(step, metrics)
                self._name_bad_files(batch)
                self._check(progress.add(step, metrics))  # looks at the step before: this one still runs
                last = self._pause(step, state, progress)
                self.watchdog.alive()
                if last:
                    break
        finally:
            trace.close()
            progress.close()
            batches.close()
        return state

    def _pause(self, step: int, state: TrainState, progress: Progress) -> bool:
        """Validate and save where it is time to; whether ``step`` is the last."""
        experiment = self.experiment
        last = self.stop() or step == experiment.steps
        self._to_validate = (
            "validation" in self.splits and step % experiment.evaluate_every == 0 and step < experiment.steps
        )
        if self._to_validate and not last:
            try:
                self._validate(step, state, progress)
            except Stopped:
                last = True
        if step % experiment.checkpoint_every == 0 or last:
            self._check(progress.settle())
            self._save(state)
        return last

    def compile_ahead(self) -> None:
        """Begin to compile the programs of every bucket, in a thread and in the order in which steps will need them."""
        first_step = max(self.checkpoints.steps(), default=0)
        if first_step >= self.experiment.steps:
            return
        train, head = {"training": True}, {"training": True, "head_only": True}
        programs = {"training": train}
        if first_step < self.programs.head_only_steps:
            programs = {"training of the head": head, **programs}
        for name, loader in self.loaders.items():
            for purpose, options in (programs if name == "train" else {"evaluation": {"training": False}}).items():
                for index in loader.plan.buckets_in_order(first_step if name == "train" else 0):
                    bucket = loader.plan.buckets[index]
                    what = f"{purpose} on {bucket.batch_size} x {bucket.max_seconds:g} s"
                    self.programs.compile_ahead(what, loader.empty_batch(index), **options)

    def _await_program(self, batch: Batch, progress: Progress) -> None:
        """Wait for the program of a step; one of a later step that has failed to compile ends the run as well."""
        which = {"training": True, "head_only": batch.step < self.programs.head_only_steps}
        if not self.programs.ready(batch, **which):
            self._check(progress.flush())  # the device will have nothing else to do
            with self.clock.spending("compilation"):
                self.programs.wait(batch, self.watchdog.alive, **which)
        self.programs.check_ahead()

    def evaluate(self, params: Any, name: str) -> Evaluation:
        """Metrics on the split ``name``.

        Raises:
            Stopped: when asked to stop meanwhile.
        """
        with self.clock.spending("evaluation"):
            batches = self._until_stopped(self.loaders[name].batches())
            evaluation = evaluate(params, batches, self.programs.predict, self.task)
        for message in evaluation.bad:
            logger.warning("%s: skipped %s", name, message)
        return evaluation

    def open_log(self, first_step: int, *, evaluated: bool = True) -> MetricsLog | None:
        """The log of the run from ``first_step`` on; ``None`` on processes other than 0."""
        if jax.process_index():
            return None
        return MetricsLog(self.run_directory.path, first_step, self.experiment.wandb_project, evaluated=evaluated)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, counting how long the loop waits for them."""
        try:
            while True:
                with self.clock.spending("data"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
        finally:
            batches.close()

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            for batch in batches:
                if self.stop():
                    raise Stopped
                self.watchdog.alive()
                yield batch
        finally:
            batches.close()

    def _validate(self, step: int, state: TrainState, progress: Progress) -> None:
        evaluation = self.evaluate(state.params, "validation")
        progress.write(step, {f"validation/{key}": value for key, value in evaluation.numbers().items()})
        self._to_validate = False
        say(f"step {step}: validation {describe(evaluation.numbers())}")

    def _save(self, state: TrainState) -> None:
        with self.clock.spending("checkpoints"):
            progress = {"clock": self.clock.record(), "rows_seen": self.rows_seen, "bad_rows": self.bad_rows}
            progress |= {"bad_files": self.bad_files, "position": self.loaders["train"].position(int(state.step))}
            progress |= {"to_validate": self._to_validate}
            self.checkpoints.save(state, progress)

    def _name_bad_files(self, batch: Batch) -> None:
        for message in batch.bad:
            if message not in self.bad_files:
                logger.warning("skipped %s", message)
                self.bad_files.append(message)

    def _check(self, arrived: tuple[int, StepMetrics] | None) -> None:
        """Abort where a run must not go on. The numbers are global, so that all processes agree."""
        if arrived is None:
            return
        step, metrics = arrived
        planned = int((self.splits["train"].plan.batch(step - 1).row_indices != EMPTY_ROW).sum())
        self.rows_seen += planned
        self.bad_rows += planned - int(metrics.utterances)
        allowed = self.experiment.data.max_bad_fraction
        if self.rows_seen >= _ROWS_BEFORE_BAD_SHARE and self.bad_rows > allowed * self.rows_seen:
            last = f"; the last is {self.bad_files[-1]}" if self.bad_files else ""
            raise TrainingError(
                f"{self.bad_rows} of {self.rows_seen} audio files cannot be read, more than data.max_bad_fraction = "
                f"{allowed:g} allows{last}"
            )
        most = self.experiment.optimizer.max_skipped_steps
        if int(metrics.skipped_in_a_row) >= most:
            raise TrainingError(
                f"the loss or its gradient was not finite, or a spike, in {most} steps in a row up to step {step} "
                f"(optimizer.max_skipped_steps); {int(metrics.infeasible)} utterances of the last one "
                f"{self.task.infeasible_advice}"
            )
