"""Length buckets: the few static shapes that utterances are padded to."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

# Bucket lengths are rounded up to this, so that they do not change with a few samples of the longest utterance.
_ROUNDING_SECONDS = 0.1
_MAX_CANDIDATES = 512


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Utterances of at most ``max_seconds`` are padded to that length, ``batch_size`` of them per step on all devices.

    Raises:
        ValueError: when either is not positive.
    """

    max_seconds: float
    batch_size: int

    def __post_init__(self):
        if not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise ValueError(f"max_seconds of a bucket is {self.max_seconds}; it must be positive")
        if self.batch_size < 1:
            raise ValueError(f"batch_size of a bucket is {self.batch_size}; it must be at least 1")

    def num_samples(self, sampling_rate: int = 16_000) -> int:
        """Length of every waveform of the bucket, in samples."""
        return round(self.max_seconds * sampling_rate)

    def described(self, seconds_per_batch: float | None) -> str:
        """How many rows batches have, and that these are more than the budget in seconds allows, where they are."""
        seconds = self.batch_size * self.max_seconds
        if seconds_per_batch is None or seconds <= seconds_per_batch + 1e-6:
            return f"batches of {self.batch_size}"
        return (
            f"batches of {self.batch_size}, {seconds:g} s of audio: more than data.batch_seconds = "
            f"{seconds_per_batch:g}, but fewer rows cannot be shared by all devices and micro-batches"
        )


def duration_samples(
    durations: Float[np.ndarray, "utterances"], sampling_rate: int = 16_000
) -> Int64[np.ndarray, "utterances"]:
    """Durations in seconds as whole samples, rounded up."""
    return np.ceil(durations * sampling_rate - 1e-6).astype(np.int64)


def suggest_buckets(
    durations: Float[np.ndarray, "utterances"],
    num_buckets: int,
    *,
    seconds_per_batch: float,
    max_batch_size: int | None = None,
    batch_multiple: int = 1,
) -> list[Bucket]:
    """Buckets for utterances of these ``durations`` (seconds), with the least padding that ``num_buckets`` allow.

    Each batch size is the largest multiple of ``batch_multiple`` (rows are divided among that many devices) that holds
    at most ``seconds_per_batch`` of padded audio and ``max_batch_size`` utterances, at least ``batch_multiple``, and
    no more than the bucket's utterances need. Fewer buckets come back when durations take fewer values.

    Raises:
        ValueError: without a positive duration, or when a limit is not positive.
    """
    for name, value in (("num_buckets", num_buckets), ("seconds_per_batch", seconds_per_batch)):
        if value <= 0:
            raise ValueError(f"{name} is {value}; it must be positive")
    known = durations[durations > 0]
    if known.size == 0:
        raise ValueError("no utterance has a known duration, so there is nothing to make batches of")
    bounds, counts = _least_padding(known, num_buckets)
    budgeted = buckets_up_to(
        bounds, seconds_per_batch=seconds_per_batch, max_batch_size=max_batch_size, batch_multiple=batch_multiple
    )
    needed = [math.ceil(count / batch_multiple) * batch_multiple for count in counts]
    return [
        Bucket(bucket.max_seconds, min(bucket.batch_size, most)) for bucket, most in zip(budgeted, needed, strict=True)
    ]


def buckets_up_to(
    bounds: Sequence[float], *, seconds_per_batch: float, max_batch_size: int | None = None, batch_multiple: int = 1
) -> list[Bucket]:
    """Buckets of these lengths in seconds, each with as many utterances as the budget of padded audio per batch holds:
    the largest multiple of ``batch_multiple`` that is within ``seconds_per_batch`` and ``max_batch_size``, at least
    ``batch_multiple``."""
    buckets = []
    for bound in bounds:
        size = int(seconds_per_batch / bound + 1e-9)
        if max_batch_size is not None:
            size = min(size, max_batch_size)
        buckets.append(Bucket(float(bound), max(size // batch_multiple * batch_multiple, batch_multiple)))
    return buckets


def equal_steps(max_seconds: float, num_buckets: int) -> list[float]:
    """Lengths of ``num_buckets`` buckets in equal steps up to ``max_seconds``, for utterances of unknown lengths."""
    return sorted({round(max_seconds * (index + 1) / num_buckets, 1) for index in range(num_buckets)})


def _least_padding(durations: np.ndarray, num_buckets: int) -> tuple[list[float], list[int]]:
    """Upper bounds of buckets that minimise the sum of padded lengths, and how many utterances each holds.

    Dynamic programming over at most 512 candidate bounds (quantiles of the rounded durations): after ``k`` rounds,
    ``cost[j]`` is the least padded length of all utterances up to candidate ``j`` in ``k`` buckets that end at ``j``.
    """
    rounded = np.ceil(durations / _ROUNDING_SECONDS).astype(np.int64)
    candidates, counts = np.unique(rounded, return_counts=True)
    if candidates.size > _MAX_CANDIDATES:
        cumulative = np.cumsum(counts)
        wanted = np.linspace(0, cumulative[-1], _MAX_CANDIDATES + 1)[1:]
        chosen = np.unique(np.searchsorted(cumulative, wanted - 0.5))
        counts = np.diff(cumulative[chosen], prepend=0)
        candidates = candidates[chosen]
    below = np.concatenate([[0], np.cumsum(counts)])
    cost = below[1:] * candidates.astype(np.float64)
    splits = []
    for _ in range(1, min(num_buckets, candidates.size)):
        # A new bucket with bound j holds the candidates i+1..j behind the best arrangement that ends at i.
        joined = cost[:, None] + (below[None, 1:] - below[1:, None]) * candidates[None, :]
        joined[np.tril_indices(candidates.size)] = np.inf
        splits.append(joined.argmin(0))
        cost = joined.min(0)
    ends = [candidates.size - 1]
    for split in reversed(splits):
        ends.append(int(split[ends[-1]]))
    ends.reverse()
    starts = [0, *(end + 1 for end in ends[:-1])]
    bounds = [round(float(candidates[end]) * _ROUNDING_SECONDS, 6) for end in ends]
    return bounds, [int(below[end + 1] - below[start]) for start, end in zip(starts, ends, strict=True)]
