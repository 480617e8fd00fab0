"""What a preflight compiles: the task and the batch shapes of an experiment, with as little of its data as is there."""

import dataclasses
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jax.sharding import Mesh

from speech_flax.configuration import CONFIG_FILE
from speech_flax.data.loader import IGNORED_LABEL, Batch, label_widths
from speech_flax.data.stream_loader import streamed_label_widths
from speech_flax.training.corpus import batch_multiple, buckets_from_settings, durations_file, open_split
from speech_flax.training.experiment import Experiment, ExperimentError
from speech_flax.training.family import FAMILIES
from speech_flax.training.sharding import process_shard
from speech_flax.training.task import LABEL_COLUMNS, Task, make_task

#: Stand-in for transcripts that are not here: the characters of English.
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ '"


@dataclasses.dataclass(frozen=True)
class BucketShape:
    """Batches of ``rows`` utterances over all chips, of ``max_seconds`` and ``max_labels`` at most; ``share`` is the
    part of all steps that has this shape."""

    max_seconds: float
    rows: int
    max_labels: int
    share: float


@dataclasses.dataclass(frozen=True)
class PreflightPlan:
    """The task, the shapes of its batches by increasing length, and what was assumed to know them."""

    task: Task
    buckets: list[BucketShape]
    assumptions: list[str]


def plan_preflight(experiment: Experiment, mesh: Mesh) -> PreflightPlan:
    """The shapes that training would compile for on ``mesh``.

    They come from the data set when ``data.train.path`` is a local file or directory, as in training. Otherwise, and
    for streams, nothing is read: the lengths are ``data.bucket_seconds``, or ``data.num_buckets`` equal steps up to
    ``data.train.max_seconds``, each as frequent as the others, and the vocabulary is ``data.vocabulary`` or the
    characters of English.

    Raises:
        ExperimentError: the data set is not here and ``data.train.max_seconds`` is not set, or the model's settings are
            wrong.
        ShardingError: the batch is too small for the slice.
    """
    assumptions: list[str] = []
    experiment = _without_weights(experiment, assumptions)
    data = experiment.data
    if data.train.streaming or not Path(data.train.path).exists():
        task, _ = make_task(experiment, [] if data.vocabulary is not None else [_CHARACTERS])
        return PreflightPlan(task, _buckets_from_settings(experiment, mesh, assumptions), assumptions)
    split = open_split(
        data.train,
        data,
        mesh,
        accumulation=experiment.accumulation,
        seed=experiment.seed,
        training=True,
        cache=durations_file(data.train, experiment.cache_directory),
        label_columns=LABEL_COLUMNS[experiment.task],
    )
    task, _ = make_task(experiment, split.labels())
    widths = label_widths(split.plan, split.utterances.texts(), task.label_encoder)
    steps = split.plan.steps_per_epoch
    shapes = zip(split.plan.buckets, widths, split.plan.batches_per_bucket, strict=True)
    buckets = [
        BucketShape(bucket.max_seconds, bucket.batch_size, width, batches / steps)
        for bucket, width, batches in shapes
        if batches
    ]
    return PreflightPlan(task, buckets, assumptions)


def empty_batch(bucket: BucketShape, task: Task, mesh: Mesh) -> Batch:
    """This process's part of a batch of that shape; its arrays take no memory."""
    rows = bucket.rows // process_shard(mesh)[1]
    return Batch(
        step=0,
        waveforms=np.broadcast_to(np.float32(0), (rows, round(bucket.max_seconds * 16_000))),
        sample_lengths=np.zeros(rows, np.int32),
        labels=np.broadcast_to(np.asarray(IGNORED_LABEL, task.label_dtype), (rows, bucket.max_labels)),
        label_lengths=np.zeros(rows, np.int32),
        valid=np.zeros(rows, bool),
        ids=[],
        texts=[],
        bad=[],
    )


def _without_weights(experiment: Experiment, assumptions: list[str]) -> Experiment:
    """The experiment with the size of its pretrained model, and without its weights, which no compiler needs."""
    model, pretrained = experiment.model, experiment.model.pretrained
    if pretrained is None:
        return experiment
    kind, _ = FAMILIES[model.family].classes(experiment.task)
    data, directory = experiment.data, _directory_here(pretrained)
    if directory is not None:
        config = kind.from_pretrained(directory)
        if data.vocabulary is None and (directory / "vocab.json").is_file():
            data = dataclasses.replace(data, vocabulary=str(directory / "vocab.json"))
    else:
        name = next((name for name in kind.PRESETS if name in pretrained), None)
        if name is None:
            raise ExperimentError(
                f"model.pretrained = {pretrained!r} is no directory here, was not downloaded from the hub before, and "
                f"is not of a known size ({', '.join(kind.PRESETS)}); download it, or give its size in model.config "
                "with model.pretrained: null"
            )
        config = kind(**kind.PRESETS[name])
        assumptions.append(f"{pretrained} is not here: its configuration is taken to be that of {name}")
    # What differs from the defaults: the task decides some fields itself, the vocabulary's size for instance.
    default = kind().to_dict()
    fields = {
        field: value
        for field, value in config.to_dict().items()
        if field in kind.field_names() and field != "id2label" and value != default.get(field)
    }
    decided = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "architectures")
    fields = {field: value for field, value in fields.items() if field not in decided}
    model = dataclasses.replace(model, pretrained=None, config={**fields, **model.config})
    return dataclasses.replace(experiment, model=model, data=data)


def _directory_here(pretrained: str) -> Path | None:
    """The directory of a model that is on this machine, its own or where the hub's downloads are kept."""
    if (Path(pretrained) / CONFIG_FILE).is_file():
        return Path(pretrained)
    try:
        downloaded = try_to_load_from_cache(pretrained, CONFIG_FILE)
    except HFValidationError:  # no hub id
        return None
    return Path(downloaded).parent if isinstance(downloaded, str) else None


def _buckets_from_settings(experiment: Experiment, mesh: Mesh, assumptions: list[str]) -> list[BucketShape]:
    data = experiment.data
    buckets = buckets_from_settings(data, batch_multiple(data, mesh, experiment.accumulation))
    if experiment.task != "ctc":
        raise ExperimentError(
            f"data.train.path = {data.train.path!r} is not on this machine, and the labels of task "
            f"{experiment.task!r} cannot be made up: preflight it where the data set is"
        )
    assumptions.append(
        f"{data.train.path} is {'streamed' if data.train.streaming else 'not here'}: {len(buckets)} equally frequent "
        f"lengths up to {buckets[-1].max_seconds:g} s, {data.labels_per_second:g} labels per second"
    )
    if data.vocabulary is None:
        assumptions.append("no data.vocabulary: the characters of English")
    widths = streamed_label_widths(buckets, data.labels_per_second)
    return [
        BucketShape(bucket.max_seconds, bucket.batch_size, width, 1 / len(buckets))
        for bucket, width in zip(buckets, widths, strict=True)
    ]
