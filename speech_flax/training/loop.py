"""The training program, read straight down: devices, data, model, optimizer, programs, steps, results."""

import dataclasses
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax

from speech_flax.data.loader import Batch, BatchLoader
from speech_flax.training.checkpoints import Checkpoints
from speech_flax.training.corpus import Split, open_split
from speech_flax.training.curves import draw_curves
from speech_flax.training.evaluation import Evaluation, describe, evaluate
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.optimizer import learning_rate_schedule, make_optimizer
from speech_flax.training.programs import Programs, parameter_count, use_compilation_cache
from speech_flax.training.progress import Progress, say
from speech_flax.training.run_directory import MetricsLog, RunDirectory
from speech_flax.training.sharding import make_mesh
from speech_flax.training.step import StepMetrics, TrainState
from speech_flax.training.task import Task, load_task, make_task

logger = logging.getLogger(__name__)


class TrainingError(ValueError):
    """A run that cannot go on: too many bad files, or too many steps without a finite loss."""


def train(experiment: Experiment) -> dict[str, Any] | None:
    """Train, evaluate and export as ``experiment`` says, continuing an unfinished run in its directory.

    Returns:
        What ``results.json`` holds; ``None`` when a signal stopped the run after a checkpoint.

    Raises:
        ExperimentError, ShardingError, SourceError, CheckpointError: for what is wrong with the experiment.
        TrainingError: when too many files are bad or the loss stays non-finite.
    """
    use_compilation_cache(experiment.compilation_cache)
    run = RunDirectory(experiment)
    if (results := run.finished()) is not None:
        say(f"{run.path} holds a finished run: {_summary(results)}. Delete it or choose another run_directory.")
        return results

    mesh = make_mesh(experiment.mesh)
    splits = open_splits(experiment, mesh, run)
    task, pretrained = make_task(experiment, splits["train"].utterances.texts())
    warn_of_unknown_labels(splits, task)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    programs = Programs(task, optimizer, mesh, seed=experiment.seed, accumulation=experiment.accumulation)

    run.open(experiment)
    checkpoints = Checkpoints(run.checkpoints, experiment.keep_checkpoints)
    trainer = Trainer(experiment, run, splits, task, programs, checkpoints)
    say(splits["train"].plan.summary())
    say(f"{parameter_count(programs.abstract_state.params) / 1e6:.2f} M parameters on {mesh.size} device(s)")
    state = trainer.initial_state(pretrained)
    del pretrained
    with interruptible() as stop_requested:
        state = trainer.run(state, stop_requested)
    checkpoints.close()
    if int(state.step) < experiment.steps:
        say(f"stopped after step {int(state.step)}; go on with: python train.py --resume {run.path}")
        return None
    return finish(trainer, state)


def open_splits(experiment: Experiment, mesh: jax.sharding.Mesh, run: RunDirectory) -> dict[str, Split]:
    """The experiment's splits by name: ``train``, and ``validation`` and ``test`` where it has them."""
    data = experiment.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    open_one = partial(open_split, settings=data, mesh=mesh, accumulation=experiment.accumulation, seed=experiment.seed)
    cache = run.path / "durations.json"
    return {
        name: open_one(source, training=name == "train", cache=cache)
        for name, source in sources.items()
        if source is not None
    }


def warn_of_unknown_labels(splits: dict[str, Split], task: Task) -> None:
    """Evaluation data may have labels, or characters in transcripts, that the model cannot predict: say so once."""
    for name, split in splits.items():
        if name != "train":
            try:
                task.check(split.utterances.texts())
            except ExperimentError as error:
                logger.warning("%s: %s", name, error)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that a first SIGTERM or SIGINT is put on, for the loop to stop in order; a second one stops at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """The loop over steps, with logging, evaluation and checkpoints at their intervals."""

    def __init__(
        self,
        experiment: Experiment,
        run: RunDirectory,
        splits: dict[str, Split],
        task: Task,
        programs: Programs,
        checkpoints: Checkpoints,
    ):
        self.experiment = experiment
        self.run_directory = run
        self.splits = splits
        self.task = task
        self.programs = programs
        self.checkpoints = checkpoints
        self.learning_rate = learning_rate_schedule(experiment.optimizer, experiment.steps)
        self.seconds = 0.0
        self.rows_seen = 0
        self.bad_files: list[str] = []
        self._loaders: dict[str, BatchLoader] = {}

    def initial_state(self, pretrained: Any) -> TrainState:
        """The newest checkpoint's state, or the state before step 0."""
        if self.checkpoints.latest_step() is None:
            return self.programs.initial_state(pretrained)
        state, progress = self.checkpoints.restore(self.programs.abstract_state)
        self.seconds = progress["train_seconds"]
        self.rows_seen = progress["rows_seen"]
        self.bad_files = progress["bad_files"]
        say(f"continuing at step {int(state.step)} from {self.run_directory.checkpoints}")
        return state

    def run(self, state: TrainState, stop_requested: list[int]) -> TrainState:
        """Train until the last step, or until ``stop_requested`` is no longer empty; the last state is saved.

        Raises:
            TrainingError: when too many files are bad or the loss stays non-finite.
        """
        experiment, first = self.experiment, int(state.step)
        if first >= experiment.steps:
            return state
        started, before = time.monotonic(), self.seconds
        loader = self.loader("train")
        self.compile_all(loader)
        batches = loader.batches(first, experiment.steps - first)
        log = MetricsLog(self.run_directory, first) if jax.process_index() == 0 else None
        progress = Progress(experiment.steps, first, log, self.learning_rate, experiment.log_every)
        try:
            for batch in batches:
                state, metrics = self.programs.train(state, batch)
                step = batch.step + 1
                self._count_files(batch)
                progress.add(step, metrics, batch)  # looks at the numbers of the step before: this one still runs
                self._abort_if_never_finite(progress.latest)
                self.seconds = before + time.monotonic() - started
                last = step == experiment.steps or bool(stop_requested)
                if "validation" in self.splits and (step % experiment.evaluate_every == 0 and not last):
                    self._validate(step, state, progress)
                if step % experiment.checkpoint_every == 0 or last:
                    self._save(state)
                if last:
                    break
            self._abort_if_never_finite(progress.flush())
        finally:
            progress.close()
            batches.close()
        self.seconds = before + time.monotonic() - started
        return state

    def loader(self, name: str) -> BatchLoader:
        """Reads the batches of the split ``name``; made once, so that decoded audio is kept between evaluations."""
        if name not in self._loaders:
            self._loaders[name] = self.splits[name].loader(
                self.task.label_encoder, self.experiment.data, self.task.label_dtype
            )
        return self._loaders[name]

    def compile_all(self, loader: BatchLoader) -> None:
        """Compile the training step of every bucket before the first one runs."""
        for index, bucket in enumerate(loader.plan.buckets):
            if loader.plan.batches_per_bucket[index] == 0:
                continue
            began = time.monotonic()
            self.programs.compile(loader.empty_batch(index), training=True)
            say(f"compiled {bucket.batch_size} x {bucket.max_seconds:g} s in {time.monotonic() - began:.1f} s")

    def evaluate(self, params: Any, name: str) -> Evaluation:
        """Metrics on the split ``name``."""
        batches = self.loader(name).batches()
        evaluation = evaluate(params, batches, self.programs.predict, self.task)
        for message in evaluation.bad:
            logger.warning("%s: skipped %s", name, message)
        return evaluation

    def _validate(self, step: int, state: TrainState, progress: "Progress") -> None:
        evaluation = self.evaluate(state.params, "validation")
        progress.write(step, {f"validation/{key}": value for key, value in evaluation.numbers().items()})
        progress.say(f"step {step}: validation {describe(evaluation.metrics)}, loss {evaluation.loss:.3f}")

    def _save(self, state: TrainState) -> None:
        progress = {"train_seconds": self.seconds, "rows_seen": self.rows_seen, "bad_files": self.bad_files}
        self.checkpoints.save(state, progress)

    def _count_files(self, batch: Batch) -> None:
        self.rows_seen += int(batch.valid.sum()) + len(batch.bad)
        for message in batch.bad:
            if message not in self.bad_files:
                logger.warning("skipped %s", message)
                self.bad_files.append(message)
        allowed = self.experiment.data.max_bad_fraction
        seen = min(self.rows_seen, len(self.splits["train"].utterances))
        if seen >= 20 and len(self.bad_files) > allowed * seen:
            raise TrainingError(
                f"{len(self.bad_files)} of {seen} audio files cannot be read, more than data.max_bad_fraction = "
                f"{allowed:g} allows; the last is {self.bad_files[-1]}"
            )

    def _abort_if_never_finite(self, metrics: StepMetrics | None) -> None:
        allowed = self.experiment.optimizer.max_skipped_steps
        if metrics is not None and int(metrics.skipped_in_a_row) >= allowed:
            raise TrainingError(
                f"the loss or its gradient was not finite in {allowed} steps in a row "
                f"(optimizer.max_skipped_steps); {int(metrics.infeasible)} utterances of the last one "
                f"{self.task.infeasible_advice}"
            )


def finish(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """Export the model, score it, draw the curves, write the results, and say what to do next."""
    run, experiment = trainer.run_directory, trainer.experiment
    export_model(trainer, state)
    results: dict[str, Any] = {"steps": int(state.step), "train_seconds": round(trainer.seconds, 1)}
    results |= {"skipped_steps": int(state.skipped), "bad_files": trainer.bad_files}
    evaluation = None
    for name in ("validation", "test"):
        if name in trainer.splits:
            evaluation = trainer.evaluate(state.params, name)
            results |= {name: evaluation.numbers(), **evaluation.metrics}
            if jax.process_index() == 0:
                log = MetricsLog(run, experiment.steps)
                log.write(experiment.steps, {f"{name}/{key}": value for key, value in evaluation.numbers().items()})
                log.close()
    if evaluation is not None:
        results["examples"] = [dataclasses.asdict(row) for row in trainer.task.examples(evaluation.rows)]
    run.write_results(results)
    if jax.process_index() == 0:
        draw_curves(run.metrics, run.curves)
        report(trainer, results)
    return results


def export_model(trainer: Trainer, state: TrainState) -> None:
    """Write ``model/`` in Transformers' layout, with its processor."""
    from jax.experimental import multihost_utils

    params = state.params
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        trainer.task.save(trainer.run_directory.model, jax.device_get(params))


def report(trainer: Trainer, results: dict[str, Any]) -> None:
    """The end of a run, on the terminal."""
    run = trainer.run_directory
    say("")
    for example in results.get("examples", []):
        say(f"  reference:  {example['reference']}\n  hypothesis: {example['hypothesis']}\n")
    say(_summary(results))
    say(f"run directory: {run.path}\nlearning curves: {run.curves}\nmodel: {run.model}")
    audio = "YOUR_RECORDING.wav"
    for split in ("test", "validation"):
        if split in trainer.splits:
            first = trainer.splits[split].utterances[0].audio
            audio = first if isinstance(first, str) else audio
            break
    say(f"next: speech-flax {trainer.task.command} {audio} --model {run.model}")


def _summary(results: dict[str, Any]) -> str:
    parts = [f"{results['steps']} steps in {results['train_seconds']:.0f} s"]
    for name in ("validation", "test"):
        if name in results:
            parts.append(f"{name} {describe(results[name])}")
    return "; ".join(parts)


def evaluate_model(experiment: Experiment, directory: str, split: str) -> Evaluation:
    """Score the model in ``directory`` on a split of ``experiment``'s data.

    Raises:
        ExperimentError: when the experiment has no such split.
    """
    source = getattr(experiment.data, split)
    if source is None:
        raise ExperimentError(f"the experiment has no data.{split}")
    use_compilation_cache(experiment.compilation_cache)
    mesh = make_mesh(experiment.mesh)
    task, params = load_task(experiment, directory)
    programs = Programs(task, make_optimizer(experiment.optimizer, 1), mesh, seed=experiment.seed)
    cache = RunDirectory(experiment).path / "durations.json"
    chosen = open_split(source, experiment.data, mesh, accumulation=1, seed=0, training=False, cache=cache)
    batches = chosen.loader(task.label_encoder, experiment.data, task.label_dtype).batches()
    return evaluate(programs.initial_state(params).params, batches, programs.predict, task)
