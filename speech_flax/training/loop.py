"""The training program, read straight down: devices, data, model, optimizer, programs, steps, results."""

import dataclasses
import logging
from functools import partial
from typing import Any

import jax

from speech_flax.storage import written_locally
from speech_flax.training.checkpoints import Checkpoints
from speech_flax.training.corpus import Split, durations_file, open_split
from speech_flax.training.curves import draw_curves
from speech_flax.training.evaluation import Evaluation, check_evaluations, describe, evaluate
from speech_flax.training.experiment import Experiment, ExperimentError, experiment_yaml
from speech_flax.training.metrics_log import check_wandb
from speech_flax.training.optimizer import Optimizer
from speech_flax.training.processes import StopRequest, check_agreement, join_processes, together
from speech_flax.training.programs import Programs, parameter_count, training_programs, use_compilation_cache
from speech_flax.training.progress import say
from speech_flax.training.run_directory import RunDirectory
from speech_flax.training.sharding import check_heads, make_mesh
from speech_flax.training.step import TrainState
from speech_flax.training.stream_corpus import StreamSplit, open_stream
from speech_flax.training.task import LABEL_COLUMNS, Task, load_task, make_task
from speech_flax.training.trainer import Stopped, Trainer
from speech_flax.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(experiment: Experiment) -> dict[str, Any] | None:
    """Train, evaluate and export as ``experiment`` says, continuing an unfinished run in its directory.

    Returns:
        What ``results.json`` holds; ``None`` when a signal stopped the run after a checkpoint.

    Raises:
        ExperimentError, ShardingError, SourceError, CheckpointError: for what is wrong with the experiment.
        speech_flax.training.trainer.TrainingError: when too many files are bad or the loss stays non-finite.
    """
    join_processes(experiment.distributed)
    use_compilation_cache(experiment.cache_directory)
    check_wandb(experiment.wandb_project)
    check_agreement("the settings", experiment_yaml(experiment))
    run = together(partial(RunDirectory, experiment))
    if (results := run.finished()) is not None:
        say(f"{run.path} holds a finished run: {_summary(results)}. Delete it or choose another run_directory.")
        return results

    mesh = make_mesh(experiment.mesh)
    splits = together(partial(open_splits, experiment, mesh, run))
    for name, split in splits.items():
        check_agreement(f"the utterances of data.{name}", str(split.plan_record()))
    task, load_weights = together(lambda: make_task(experiment, splits["train"].labels()))
    check_heads(mesh, task.model.config.num_attention_heads)
    check_evaluations(splits, task)
    warn_of_unknown_labels(splits, task)
    loaders = {
        name: split.loader(task.label_encoder, experiment.data, task.label_dtype) for name, split in splits.items()
    }
    programs = training_programs(experiment, task, mesh)

    checkpoints = Checkpoints(run.checkpoints, experiment.keep_checkpoints, experiment.keep_every)
    pretrained = together(load_weights) if load_weights is not None and not checkpoints.steps() else None
    run.open(experiment, splits["train"].plan_record())  # nothing is written before: all that can be wrong is checked
    say(splits["train"].plan.summary())
    say(f"{parameter_count(programs.abstract_state.params) / 1e6:.2f} M parameters on {mesh.size} device(s)")
    with StopRequest() as stop, Watchdog(experiment.hang_minutes) as watchdog:
        trainer = Trainer(experiment, run, splits, loaders, task, programs, checkpoints, stop, watchdog)
        try:
            trainer.compile_ahead()
            state = trainer.initial_state(pretrained)
            del pretrained
            state = trainer.run(state)
            checkpoints.close()
            return finish(trainer, state) if int(state.step) == experiment.steps else _say_stopped(run)
        except Stopped:
            return _say_stopped(run)
        except Exception:
            checkpoints.close()  # of the steps before
            raise
        finally:
            programs.abandon_ahead()


def _say_stopped(run: RunDirectory) -> None:
    say(f"stopped; go on with: python train.py --resume {run.path}")


def open_splits(experiment: Experiment, mesh: jax.sharding.Mesh, run: RunDirectory) -> dict[str, Split | StreamSplit]:
    """The experiment's splits by name: ``train``, and ``validation`` and ``test`` where it has them."""
    data = experiment.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    streamed = {}
    if data.train.streaming:
        streamed["train"] = open_stream(experiment, mesh, run.plan())
        del sources["train"]
    open_one = partial(open_split, settings=data, mesh=mesh, accumulation=experiment.accumulation, seed=experiment.seed)
    return streamed | {
        name: open_one(
            source,
            training=name == "train",
            cache=durations_file(source, experiment.cache_directory),
            planned=run.plan() if name == "train" else None,
            label_columns=LABEL_COLUMNS[experiment.task],
        )
        for name, source in sources.items()
        if source is not None
    }


def warn_of_unknown_labels(splits: dict[str, Split | StreamSplit], task: Task) -> None:
    """Evaluation data may have labels, or characters in transcripts, that the model cannot predict: say so once."""
    for name, split in splits.items():
        if name != "train":
            try:
                task.check(split.labels())
            except ExperimentError as error:
                logger.warning("%s: %s", name, error)


def finish(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """Export the model, score it, draw the curves, write the results, and say what to do next."""
    run, experiment = trainer.run_directory, trainer.experiment
    export_model(trainer, state)
    results: dict[str, Any] = {"steps": int(state.step), "train_seconds": round(trainer.clock.running, 1)}
    results |= {
        "goodput": round(trainer.clock.goodput, 4),
        "skipped_steps": int(state.skipped),
        "bad_files": trainer.bad_files,
    }
    evaluation, log = None, trainer.open_log(experiment.steps, evaluated=False)
    for name in ("validation", "test"):
        if name in trainer.splits:
            evaluation = trainer.evaluate(state.params, name)
            results |= {name: evaluation.numbers(), **evaluation.metrics}
            if log is not None:
                log.write(experiment.steps, {f"{name}/{key}": value for key, value in evaluation.numbers().items()})
    if log is not None:
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
        with written_locally(trainer.run_directory.model) as directory:
            trainer.task.save(directory, jax.device_get(params))


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
    join_processes(experiment.distributed)
    use_compilation_cache(experiment.cache_directory)
    mesh = make_mesh(experiment.mesh)
    task, params = load_task(experiment, directory)
    programs = Programs(task, Optimizer(experiment.optimizer, 1), mesh, seed=experiment.seed)
    cache = durations_file(source, experiment.cache_directory)
    chosen = open_split(
        source,
        experiment.data,
        mesh,
        accumulation=1,
        seed=0,
        training=False,
        cache=cache,
        label_columns=LABEL_COLUMNS[experiment.task],
    )
    check_agreement(f"the utterances of data.{split}", str(chosen.plan_record()))
    check_evaluations({split: chosen}, task)
    batches = chosen.loader(task.label_encoder, experiment.data, task.label_dtype).batches()
    return evaluate(programs.place(params), batches, programs.predict, task)
