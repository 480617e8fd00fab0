"""Where the time of a run goes, and how long it will take."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


class Clock:
    """Seconds spent by activity, over all restarts of a run.

    Whatever is not spent in :meth:`spending` is taken for training. Time that a killed run spent after its last
    checkpoint is lost, as is the time between two parts of a run: both lower the goodput.
    """

    def __init__(self, record: dict[str, Any] | None = None):
        record = record or {"begun": time.time(), "running": 0.0, "seconds": {}}
        self._begun: float = record["begun"]
        self._before: float = record["running"]
        self._since = time.monotonic()
        self._seconds = defaultdict(float, record["seconds"])
        self._counts: dict[str, int] = defaultdict(int)
        self._spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Count the seconds of the block to ``activity``."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._seconds[activity] += seconds
            self._spent[activity] += seconds
            self._counts[activity] += 1

    def mean(self, activity: str) -> float:
        """Mean seconds of one block of ``activity`` in this part of the run."""
        return self._spent[activity] / max(1, self._counts[activity])

    def seconds(self, activity: str) -> float:
        """Seconds spent in ``activity``."""
        return self._seconds[activity]

    @property
    def running(self) -> float:
        """Seconds that the run has been running."""
        return self._before + time.monotonic() - self._since

    @property
    def elsewhere(self) -> float:
        """Seconds spent in any activity but training."""
        return sum(self._seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time since the run was first started that went into training steps that count."""
        return (self.running - self.elsewhere) / max(time.time() - self._begun, 1e-9)

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the clock."""
        return {"begun": self._begun, "running": self.running, "seconds": dict(self._seconds)}


class Estimate:
    """How long the steps that remain will take, from the time per step of every length bucket."""

    def __init__(self, bucket_samples: Sequence[int]):
        self._samples = np.array(bucket_samples, np.float64)
        self._seconds = np.zeros(len(bucket_samples))
        self._steps = np.zeros(len(bucket_samples))

    def add(self, bucket_index: int, seconds: float) -> None:
        """Note how long a step of a bucket took."""
        self._seconds[bucket_index] += seconds
        self._steps[bucket_index] += 1

    def seconds(self, batches: Sequence[int] | np.ndarray) -> float | None:
        """Seconds for this many batches per bucket; a bucket not seen yet is taken to cost as others do per sample."""
        if not self._steps.any():
            return None
        per_sample = self._seconds.sum() / (self._steps * self._samples).sum()
        seen = self._steps > 0
        per_step = np.where(seen, self._seconds / np.where(seen, self._steps, 1), per_sample * self._samples)
        return float((per_step * np.asarray(batches)).sum())
