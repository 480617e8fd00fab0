"""The utterances of an experiment, and the plans that batch them."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from speech_flax.audio.decoding import AudioError
from speech_flax.data.buckets import Bucket, buckets_up_to, duration_samples, equal_steps, suggest_buckets
from speech_flax.data.loader import BatchLoader, LabelEncoder
from speech_flax.data.plan import BatchPlan
from speech_flax.data.sources import DataSource, Utterances, open_source
from speech_flax.data.speed import SpeedPerturbed
from speech_flax.training.experiment import DataSettings, ExperimentError
from speech_flax.training.sharding import ShardingError, batch_divisor, process_shard


@dataclasses.dataclass(frozen=True)
class Split:
    """Utterances of one purpose, their batch plan, and which part (index, count) of every batch this process reads."""

    utterances: Utterances | SpeedPerturbed
    plan: BatchPlan
    shard: tuple[int, int]

    def loader(self, encoder: LabelEncoder, settings: DataSettings, label_dtype: DTypeLike) -> BatchLoader:
        """Reads this process's rows of the batches."""
        return BatchLoader(
            self.plan,
            self.utterances,
            encoder,
            label_dtype=label_dtype,
            shard=self.shard,
            num_workers=settings.num_workers,
            cache_decoded_mb=settings.cache_decoded_mb,
        )

    def labels(self) -> Sequence[str]:
        """Transcripts or other labels of all utterances."""
        return self.utterances.texts()

    def plan_record(self) -> dict[str, Any]:
        """What a continued run needs to make the same batches on another mesh, as plain data."""
        digest = hashlib.blake2b(self.plan.num_samples.tobytes(), digest_size=8)
        digest.update("\n".join((*self.utterances.ids(), *self.utterances.texts())).encode())
        buckets = [[bucket.max_seconds, bucket.batch_size] for bucket in self.plan.buckets]
        return {"utterances": len(self.utterances), "digest": digest.hexdigest(), "buckets": buckets}


def durations_file(source: DataSource, cache_directory: str | None) -> Path | None:
    """Where the lengths of a source's audio files are kept between runs."""
    if cache_directory is None:
        return None
    name = hashlib.blake2b(f"{source.path}|{source.split}|{source.name}".encode(), digest_size=8).hexdigest()
    return Path(os.path.expandvars(cache_directory)).expanduser() / "durations" / f"{name}.npz"


def open_split(
    source: DataSource,
    settings: DataSettings,
    mesh: Mesh,
    *,
    accumulation: int,
    seed: int,
    training: bool,
    cache: Path | None,
    planned: dict[str, Any] | None = None,
    label_columns: Sequence[str] | None = None,
) -> Split:
    """Read a source's table and durations (remembered in ``cache``), and plan its batches: as the record ``planned`` of
    an earlier run says, or anew.

    Raises:
        ShardingError: when batches cannot be cut into as many parts as there are shards and micro-batches.
        ExperimentError: when the utterances are no longer those that were planned for.
    """
    multiple = batch_multiple(settings, mesh, accumulation if training else 1)
    shard = process_shard(mesh)
    utterances = open_source(source, cache=cache, label_columns=label_columns)
    durations = np.asarray(utterances.durations(cache))
    if not durations.any():
        _explain_unreadable(utterances)
    if training and settings.speed_factors != (1.0,):
        utterances = SpeedPerturbed(utterances, settings.speed_factors)
        durations = utterances.durations()
    if planned is not None:
        buckets = planned_buckets(planned, multiple)
    elif settings.bucket_seconds is not None:
        buckets = buckets_from_settings(settings, multiple)
    else:
        buckets = suggest_buckets(
            durations,
            settings.num_buckets,
            seconds_per_batch=settings.batch_seconds,
            max_batch_size=settings.batch_size,
            batch_multiple=multiple,
        )
    samples, budget = duration_samples(durations), settings.batch_seconds
    plan = BatchPlan(samples, buckets, seed=seed, shuffle=training, seconds_per_batch=budget)
    split = Split(utterances, plan, shard)
    if planned is not None and split.plan_record() != planned:
        raise ExperimentError(
            f"{source.path} has changed since this run was begun ({planned['utterances']} utterances then, "
            f"{len(utterances)} now): restore it, or choose another run_directory"
        )
    return split


def batch_multiple(settings: DataSettings, mesh: Mesh, accumulation: int) -> int:
    """What the number of rows of every batch must be a multiple of.

    Raises:
        ShardingError: when the settings do not allow batches as large as that.
    """
    multiple = batch_divisor(mesh) * accumulation
    names = "the product of mesh.data, mesh.fsdp and accumulation"
    if settings.train.streaming:
        multiple = math.lcm(multiple, settings.stream_readers)
        names += ", and a multiple of data.stream_readers"
    if settings.batch_size < multiple:
        raise ShardingError(
            f"data.batch_size = {settings.batch_size} is smaller than {multiple}, {names}: every device needs a row in "
            "every micro-batch"
        )
    return multiple


def buckets_from_settings(settings: DataSettings, multiple: int) -> list[Bucket]:
    """Buckets of the lengths ``bucket_seconds``, or in equal steps up to the longest training utterance at its slowest.

    Raises:
        ExperimentError: when neither is known.
    """
    bounds, longest = settings.bucket_seconds, settings.train.max_seconds
    if bounds is None and longest is None:
        raise ExperimentError(
            f"the lengths of the utterances of data.train.path = {settings.train.path!r} are not known beforehand: set "
            "data.train.max_seconds, or data.bucket_seconds"
        )
    if bounds is None:
        bounds = equal_steps(longest / min(settings.speed_factors), settings.num_buckets)
    return buckets_up_to(
        bounds,
        seconds_per_batch=settings.batch_seconds,
        max_batch_size=settings.batch_size,
        batch_multiple=multiple,
    )


def planned_buckets(planned: dict[str, Any], multiple: int) -> list[Bucket]:
    """The buckets that a run was begun with.

    Raises:
        ShardingError: when their batches cannot be cut into as many parts as are needed now.
    """
    buckets = [Bucket(seconds, size) for seconds, size in planned["buckets"]]
    for bucket in buckets:
        if bucket.batch_size % multiple:
            raise ShardingError(
                f"this run was begun with batches of {bucket.batch_size} utterances, which mesh.data x mesh.fsdp x "
                f"accumulation = {multiple} does not divide; choose a mesh and accumulation that do"
            )
    return buckets


def _explain_unreadable(utterances: Utterances) -> None:
    """Raise for a source of which no audio file can be read.

    Raises:
        ExperimentError: with the cause for the first one.
    """
    cause = ""
    try:
        utterances.waveform(0)
    except (AudioError, OSError) as error:
        cause = f"; the first: {error}"
    raise ExperimentError(
        f"none of the {len(utterances)} audio files of {utterances.source.path} can be read{cause}; check the column "
        "of paths and audio_directory"
    )
