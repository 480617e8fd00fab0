"""Training utterances that are streamed, and the plan that batches them."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from speech_flax.audio.decoding import AudioError
from speech_flax.data.loader import LabelEncoder
from speech_flax.data.shards import Shards, open_shards
from speech_flax.data.sources import DataSource
from speech_flax.data.stream import Stream
from speech_flax.data.stream_loader import StreamLoader
from speech_flax.data.stream_plan import StreamPlan
from speech_flax.pretrained import pretrained_directory
from speech_flax.training.corpus import batch_multiple, buckets_from_settings, planned_buckets
from speech_flax.training.experiment import DataSettings, Experiment, ExperimentError
from speech_flax.training.processes import exchange
from speech_flax.training.sharding import process_shard


@dataclasses.dataclass(frozen=True)
class StreamSplit:
    """A stream of utterances to train on, its plan, and which part (index, count) of every batch this process reads."""

    source: DataSource
    shards: Shards
    plan: StreamPlan
    shard: tuple[int, int]
    sample: tuple[str, ...]

    def loader(self, encoder: LabelEncoder, settings: DataSettings, label_dtype: DTypeLike) -> StreamLoader:
        """Reads this process's rows of the batches."""
        return StreamLoader(
            self.plan,
            self.source,
            self.shards,
            encoder,
            labels_per_second=settings.labels_per_second,
            speeds=settings.speed_factors,
            label_dtype=label_dtype,
            shard=self.shard,
            num_workers=settings.num_workers,
            exchange=exchange,
        )

    def labels(self) -> Sequence[str]:
        """Transcripts of the first rows; what others hold is not known beforehand."""
        return self.sample

    def plan_record(self) -> dict[str, Any]:
        """What a continued run needs to make the same batches on another mesh, as plain data."""
        digest = hashlib.blake2b(self.shards.identity.encode(), digest_size=8).hexdigest()
        buckets = [[bucket.max_seconds, bucket.batch_size] for bucket in self.plan.buckets]
        return {"shards": len(self.shards), "digest": digest, "buckets": buckets}


def open_stream(experiment: Experiment, mesh: Mesh, planned: dict[str, Any] | None = None) -> StreamSplit:
    """Find the shards of ``experiment.data.train``, look at the first rows, and plan batches: as the record ``planned``
    of an earlier run says, or anew.

    Raises:
        ExperimentError: for settings that a stream cannot have, or when the shards are no longer those of ``planned``.
        ShardingError: when batches cannot be cut into as many parts as there are shards and micro-batches.
        SourceError: for data that cannot be read.
    """
    data = experiment.data
    check_streamable(experiment)
    multiple = batch_multiple(data, mesh, experiment.accumulation)
    buckets = buckets_from_settings(data, multiple) if planned is None else planned_buckets(planned, multiple)
    try:
        plan = StreamPlan(
            buckets,
            readers=data.stream_readers,
            window_size=data.shuffle_buffer // data.stream_readers,
            seed=experiment.seed,
            seconds_per_batch=data.batch_seconds,
        )
    except ValueError as error:
        raise ExperimentError(
            f"data.shuffle_buffer = {data.shuffle_buffer} with data.stream_readers = {data.stream_readers}: {error}"
        ) from error
    shards = open_shards(data.train.path, data.train.split, data.train.name)
    split = StreamSplit(data.train, shards, plan, process_shard(mesh), _sample(data.train, shards, plan))
    if planned is not None and split.plan_record() != planned:
        raise ExperimentError(
            f"{data.train.path} has changed since this run was begun ({planned['shards']} shards then, {len(shards)} "
            "now): restore it, or choose another run_directory"
        )
    return split


def check_streamable(experiment: Experiment) -> None:
    """Refuse what needs to know all training data beforehand.

    Raises:
        ExperimentError: with what to change.
        FileNotFoundError: when the pretrained model, which may have a vocabulary, is not found.
    """
    data, pretrained = experiment.data, experiment.model.pretrained
    if experiment.task != "ctc":
        reason = f"the labels of task {experiment.task} are found by looking at all of them; leave it out"
    elif data.vocabulary is None and not (pretrained and (pretrained_directory(pretrained) / "vocab.json").exists()):
        reason = "its characters are not known beforehand: set data.vocabulary"
    elif data.cache_decoded_mb:
        reason = "what a stream has passed is not kept: leave out data.cache_decoded_mb"
    elif data.train.limit is not None:
        reason = "a stream that is trained on has no limit: leave out data.train.limit"
    else:
        return
    raise ExperimentError(f"data.train.streaming: {reason}")


def _sample(source: DataSource, shards: Shards, plan: StreamPlan) -> tuple[str, ...]:
    """Transcripts of the first rows.

    Raises:
        ExperimentError: when there are none, or none of their audio can be read.
    """
    stream = Stream(source, shards, readers=plan.readers, window_size=plan.window_size, seed=plan.seed)
    rows = stream.sample()
    cause = f"every one of the first rows of {shards.origin} is left out"
    for row in rows:
        try:
            stream.decode(row)
        except (AudioError, OSError) as error:
            cause = f"the audio of the first rows of {shards.origin} cannot be read: {error}"
        else:
            return tuple(row.text for row in rows)
    raise ExperimentError(f"{cause}; check the columns and audio_directory")
