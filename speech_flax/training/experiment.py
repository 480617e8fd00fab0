"""What an experiment is: frozen dataclasses, read from a YAML file and overridden on the command line.

Every leaf is typed and has its place; an unknown key is refused with the nearest known one named. The resolved
experiment is written into the run directory and, read back, gives the same experiment.
"""

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from speech_flax.data.sources import DataSource
from speech_flax.storage import in_bucket
from speech_flax.training.config_files import with_bases

#: What numbers must be, in words and as a test, and the fields that hold one or several of them.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 1": (
        lambda number: number >= 1,
        "steps accumulation log_every evaluate_every checkpoint_every keep_checkpoints keep_every model.scan_unroll "
        "features.stride features.num_mel_bins data.batch_size data.num_buckets data.shuffle_buffer "
        "data.stream_readers data.num_workers optimizer.max_skipped_steps",
    ),
    "positive": (
        lambda number: number > 0,
        "data.batch_seconds data.bucket_seconds data.labels_per_second data.speed_factors optimizer.learning_rate "
        "optimizer.head_learning_rate optimizer.epsilon",
    ),
    "at least 0": (
        lambda number: number >= 0,
        "hang_minutes data.cache_decoded_mb optimizer.head_only_steps optimizer.weight_decay "
        "optimizer.max_gradient_norm",
    ),
    "at least 0 and below 2**63": (lambda number: 0 <= number < 2**63, "seed"),
    "at least 0 and below 1": (lambda number: 0 <= number < 1, "optimizer.betas"),
    "a share, from 0 to 1": (lambda number: 0 <= number <= 1, "data.max_bad_fraction optimizer.final_scale"),
    "a share of all steps, from 0 to 1": (lambda number: 0 <= number <= 1, "optimizer.warmup optimizer.hold"),
    "more than 1, or 0": (lambda number: number > 1 or number == 0, "optimizer.spike_factor"),
}


class ExperimentError(ValueError):
    """A mistake in a configuration file or on the command line, in one sentence."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model that is trained.

    Args:
        family: Model family.
        pretrained: Directory (here or in a bucket, gs://) or hub id whose weights are fine-tuned; none trains from
            random weights.
        config: Fields of the model's configuration that replace the defaults, or those of ``pretrained``.
        dtype: Computation type. Parameters are always float32; softmax, norms and losses are computed in float32.
        remat: What is kept for the backward pass: all ("none"), matrix products, depthwise convolutions and attention
            ("dots"), attention and layer inputs ("attention"), both with the statistics of layer norms, or layer
            inputs only ("full").
        scan_unroll: Encoder layers per iteration of the compiled loop: more compile slower and may run faster.
        frozen: Regular expressions; parameters in whose path one is found are not trained, such as feature_extractor.
            The encoder's layers are one stack: all of them or none.
    """

    family: Literal["wav2vec2-bert", "hubert"] = "wav2vec2-bert"
    pretrained: str | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    scan_unroll: int = 1
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FeatureSettings:
    """The log-mel front end of Wav2Vec2-BERT; ignored when ``model.pretrained`` brings its own.

    Args:
        stride: Log-mel frames of 10 ms that are stacked into one feature frame.
        num_mel_bins: Mel filters per log-mel frame.
    """

    stride: int = 2
    num_mel_bins: int = 80


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where utterances come from, and how they are batched.

    Args:
        train: Utterances to train on.
        validation: Utterances whose error rate is followed during training.
        test: Utterances whose error rate is reported at the end.
        vocabulary: A ``vocab.json``; none builds one from the characters of the training transcripts.
        trials: File with pairs of utterances that speaker verification is scored on: lines "1,FILE,FILE" (same speaker)
            or "0,FILE,FILE"; none compares every pair of an evaluation's utterances.
        batch_seconds: Audio seconds per step, padding included, over all devices; more only where less does not give
            every device a row in every micro-batch.
        batch_size: Utterances per step at most.
        num_buckets: Number of length buckets, each a static shape that is compiled once.
        bucket_seconds: Lengths of the buckets in increasing order; none takes ``num_buckets`` of them, those with the
            least padding or, where lengths are not known beforehand, equal steps up to ``train.max_seconds``.
        shuffle_buffer: Utterances of a stream that are shuffled, and sorted into buckets, at a time.
        stream_readers: Parts that the shards of a stream are dealt out to, each read on its own. The number of hosts,
            or a multiple of it: every host reads its own shards alone.
        labels_per_second: Most labels per second of a bucket's length where transcripts are not known beforehand;
            utterances of a stream that have more are left out.
        num_workers: Threads that read and decode audio ahead of the device.
        speed_factors: Speeds at which every training utterance is heard per epoch: [0.9, 1.0, 1.1] makes three of one.
        cache_decoded_mb: Memory for decoded audio that is kept between epochs, in MiB.
        max_bad_fraction: Share of unreadable files among those seen that stops the run.
    """

    train: DataSource
    validation: DataSource | None = None
    test: DataSource | None = None
    vocabulary: str | None = None
    trials: str | None = None
    batch_seconds: float = 320.0
    batch_size: int = 512
    num_buckets: int = 4
    bucket_seconds: tuple[float, ...] | None = None
    shuffle_buffer: int = 4096
    stream_readers: int = 1
    labels_per_second: float = 25.0
    num_workers: int = 2
    speed_factors: tuple[float, ...] = (1.0,)
    cache_decoded_mb: int = 0
    max_bad_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule.

    Args:
        learning_rate: Peak learning rate.
        head_learning_rate: Peak learning rate of the head, all that is not in the base model; none is that of the rest.
        head_only_steps: First steps, in which the head alone is trained.
        schedule: After a linear warm-up: hold, then decay exponentially ("tri_stage"); decay linearly to the final
            rate; or follow half a cosine down to it.
        warmup: Share of all steps in which the learning rate rises.
        hold: Share of all steps at the peak rate (tri_stage).
        final_scale: Learning rate of the last step relative to the peak.
        weight_decay: Decoupled decay of matrices; norms and biases are never decayed.
        betas: Decay rates of the moments.
        epsilon: Added to the root of the second moment.
        max_gradient_norm: Global norm to which gradients are clipped; 0 turns that off.
        spike_factor: A step whose loss or gradient norm is this many times its running average (at least 1) is
            skipped; 0 turns that off.
        max_skipped_steps: Consecutive skipped steps (not finite, or a spike) that abort the run.
    """

    learning_rate: float = 5e-5
    head_learning_rate: float | None = None
    head_only_steps: int = 0
    schedule: Literal["tri_stage", "linear", "cosine"] = "tri_stage"
    warmup: float = 0.1
    hold: float = 0.4
    final_scale: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    max_gradient_norm: float = 1.0
    spike_factor: float = 20.0
    max_skipped_steps: int = 20


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Shape of the device mesh; at most one axis is -1 and takes the devices that remain.

    Args:
        data: Replicas of the parameters, each with its own rows of the batch.
        fsdp: Shards of parameters and optimizer state, each with its own rows of the batch.
        tensor: Shards of every layer's width.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment: everything that decides the outcome of a run, and where it is kept.

    Args:
        data: Utterances and batches.
        run_directory: Directory of this run, here or in a bucket (gs://); an unfinished run in it is continued.
        task: What is learned: transcripts (ctc), a class or value of every utterance (sequence_classification),
            labels of every frame (frame_classification), or embeddings of speakers (xvector).
        seed: Decides initial weights, data order, dropout and SpecAugment.
        steps: Optimizer steps.
        accumulation: Micro-batches per step; same gradients, less memory.
        log_every: Steps between two log lines.
        evaluate_every: Steps between two evaluations on the validation utterances.
        checkpoint_every: Steps between two checkpoints.
        keep_checkpoints: How many of the newest checkpoints are kept.
        keep_every: Checkpoints at multiples of this many steps are kept for good; none keeps the newest alone.
        cache_directory: Directory in which compiled programs and the lengths of audio files are kept for the next run;
            none turns that off.
        hang_minutes: When nothing has moved for this long, the stacks of all threads are printed, again and again; 0
            turns that off.
        profile_steps: First and last step (from 1) of a profiler trace, written to ``profile/`` in the run directory.
        wandb_project: Weights & Biases project to log to, beside JSON Lines and TensorBoard; none logs to no one else.
        distributed: Join the other hosts of a TPU slice or cluster; to be set on all of them.
        model: The model.
        features: The log-mel front end.
        optimizer: Optimizer and schedule.
        mesh: Device mesh.

    Raises:
        ExperimentError: for a value that a field cannot have.
    """

    data: DataSettings
    run_directory: str
    task: Literal["ctc", "sequence_classification", "frame_classification", "xvector"] = "ctc"
    seed: int = 0
    steps: int = 10_000
    accumulation: int = 1
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int | None = None
    cache_directory: str | None = "~/.cache/speech_flax"
    hang_minutes: float = 30.0
    profile_steps: tuple[int, int] | None = None
    wandb_project: str | None = None
    distributed: bool = False
    model: ModelSettings = ModelSettings()
    features: FeatureSettings = FeatureSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()

    def __post_init__(self):
        _check_ranges(self)
        _check_patterns(self.model.frozen)
        if self.cache_directory is not None and in_bucket(self.cache_directory):
            raise ExperimentError(f"cache_directory is {self.cache_directory}; it must be a directory of this machine")
        bounds = self.data.bucket_seconds
        if bounds is not None and list(bounds) != sorted(set(bounds)):
            raise ExperimentError(f"data.bucket_seconds is {list(bounds)}; it must be increasing lengths in seconds")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            first, last = self.profile_steps
            raise ExperimentError(f"profile_steps is {first}, {last}; it must be a first and a last step, from 1 on")
        optimizer = self.optimizer
        if optimizer.schedule == "tri_stage" and optimizer.warmup + optimizer.hold > 1 + 1e-9:
            raise ExperimentError(
                f"optimizer.warmup = {optimizer.warmup:g} and optimizer.hold = {optimizer.hold:g} are shares of all "
                "steps; together they must not exceed 1"
            )
        if self.data.trials is not None and self.task != "xvector":
            raise ExperimentError(f"data.trials is what task xvector is scored on; task {self.task} has no use for it")


def _check_ranges(experiment: Experiment) -> None:
    """Refuse numbers that a run would end at, or that would train nothing.

    Raises:
        ExperimentError: with the field, its value, and what it must be.
    """
    for words, (holds, names) in _RANGES.items():
        for name in names.split():
            value = operator.attrgetter(name)(experiment)
            several = isinstance(value, tuple)
            numbers = value if several else () if value is None else (value,)
            if value == () or not all(math.isfinite(number) and holds(number) for number in numbers):
                must = f"{list(value)}; it must hold numbers that are" if several else f"{value}; it must be"
                raise ExperimentError(f"{name} is {must} {words}")


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ExperimentError(f"model.frozen: {pattern!r} is no regular expression: {error}") from error


def experiment_parser(prog: str = "train.py") -> ArgumentParser:
    """The command line of one experiment: ``--config FILE`` and one option per leaf."""
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        description="Train a model as a configuration file describes it; every field can be overridden.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of the experiment, see configs/; its key base names a file that it builds upon.",
    )
    parser.add_class_arguments(Experiment)
    return parser


def parse_experiment(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Experiment, Any]:
    """The experiment that ``arguments`` describe, and the other options of ``parser`` as a namespace. A configuration
    file may build upon another, see :func:`~speech_flax.training.config_files.merged_file`.

    Raises:
        ExperimentError: for an unknown key, a value of the wrong type, or a missing or malformed file.
    """
    try:
        options = parser.parse_args(with_bases(arguments))
        instantiated = parser.instantiate(options)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ExperimentError(_one_sentence(str(error))) from error
    names = [field.name for field in dataclasses.fields(Experiment)]
    return Experiment(**{name: instantiated[name] for name in names}), options


def read_experiment(path: str | Path, *overrides: str) -> Experiment:
    """The experiment in a YAML file, with command-line style ``overrides`` (``"--seed=1"``)."""
    return parse_experiment(experiment_parser(), ["--config", str(path), *overrides])[0]


def experiment_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML that :func:`read_experiment` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(_plain(experiment), sort_keys=False)


def differences(ours: Experiment, theirs: Experiment) -> list[str]:
    """Dotted names of the leaves in which two experiments differ."""
    left, right = dict(_leaves(_plain(ours))), dict(_leaves(_plain(theirs)))
    return [name for name in {**left, **right} if left.get(name) != right.get(name)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}.{key}" if name else key)


def _field_names(kind: type) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        yield field.name
    for nested in (DataSettings, ModelSettings, FeatureSettings, OptimizerSettings, MeshSettings, DataSource):
        if kind is Experiment:
            yield from _field_names(nested)


def _one_sentence(message: str) -> str:
    """The parser's message on one line, with the nearest known name for a key that does not exist."""
    message = re.sub(r"\s+", " ", message).strip()
    message = re.sub(r"Problem with given class_path '[^']*': ?", "", message)
    unknown = re.search(r"(?:accept option|Option|Key|arguments:) '?(?:--)?([\w.]+)'?", message)
    if unknown and ("accept" in message or "nrecognized" in message):
        name = unknown.group(1).split(".")[-1]
        nearest = difflib.get_close_matches(name, sorted(set(_field_names(Experiment))), n=1, cutoff=0.5)
        message += f"; did you mean '{nearest[0]}'?" if nearest else "; see --help for the known names"
    return message
