"""The utterances of an experiment, and the plans that batch them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from speech_flax.data.buckets import duration_samples, suggest_buckets
from speech_flax.data.loader import BatchLoader, LabelEncoder
from speech_flax.data.plan import BatchPlan
from speech_flax.data.sources import DataSource, Utterances, open_source
from speech_flax.training.experiment import DataSettings
from speech_flax.training.sharding import ShardingError, batch_divisor


@dataclasses.dataclass(frozen=True)
class Split:
    """Utterances of one purpose and their batch plan."""

    utterances: Utterances
    plan: BatchPlan

    def loader(self, encoder: LabelEncoder, settings: DataSettings, label_dtype: DTypeLike) -> BatchLoader:
        """Reads this process's rows of the batches."""
        return BatchLoader(
            self.plan,
            self.utterances,
            encoder,
            label_dtype=label_dtype,
            shard=(jax.process_index(), jax.process_count()),
            num_workers=settings.num_workers,
            cache_decoded_mb=settings.cache_decoded_mb,
        )

    @property
    def seconds(self) -> float:
        """Audio of one pass."""
        return float(self.plan.num_samples.sum()) / self.plan.sampling_rate


def open_split(
    source: DataSource, settings: DataSettings, mesh: Mesh, *, accumulation: int, seed: int, training: bool, cache: Path
) -> Split:
    """Read a source's table and durations (remembered in ``cache``), and plan its batches.

    Raises:
        ShardingError: when ``data.batch_size`` is smaller than the number of shards.
    """
    multiple = batch_divisor(mesh) * (accumulation if training else 1)
    if settings.batch_size < multiple:
        raise ShardingError(
            f"data.batch_size = {settings.batch_size} is smaller than {multiple}, the product of mesh.data, mesh.fsdp "
            "and accumulation: every device needs a row in every micro-batch"
        )
    utterances = open_source(source, cache=cache)
    durations = np.asarray(utterances.durations(cache))
    buckets = suggest_buckets(
        durations,
        settings.num_buckets,
        seconds_per_batch=settings.batch_seconds,
        max_batch_size=settings.batch_size,
        batch_multiple=multiple,
    )
    plan = BatchPlan(duration_samples(durations), buckets, seed=seed, shuffle=training)
    return Split(utterances, plan)
