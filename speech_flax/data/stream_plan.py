"""Which utterances of a stream make up which step: window by window, the same for any number of hosts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from speech_flax.data.buckets import Bucket
from speech_flax.data.plan import EMPTY_ROW, PlannedBatch, random_permutation


class WindowPlan:
    """Batches of the utterances of one window: a stretch of the stream that is shuffled and sorted into buckets as one.

    ``num_samples[r, i]`` is the length of the ``i``-th utterance that reader ``r`` brings to the window; row indices
    number them reader by reader. Every reader fills an equal, consecutive part of every batch, so that the hosts that
    hold those rows need that reader's utterances and no others. Readers line up by length: of each, the longest
    utterances come first, in random order within a bucket, and a batch takes the next ones of all readers and the
    bucket that holds the longest of them. What does not fill a batch of its bucket is filled up with utterances of the
    next shorter one; only the last batch, the shortest, may have empty rows. At last the batches are shuffled.

    The plan depends on its arguments alone; the random numbers are raw output of Philox, as in ``BatchPlan``.

    Args:
        num_samples: Length of every utterance in samples, at most that of the longest bucket; 0 when unknown.
        buckets: Static shapes, by increasing length, each of a multiple of the number of readers.
        seed: Decides the order of the data.
        window: Number of the window in the stream.
        first_step: Step of its first batch.
        sampling_rate: Samples per second.
    """

    def __init__(
        self,
        num_samples: Int64[np.ndarray, "readers utterances"],
        buckets: Sequence[Bucket],
        *,
        seed: int,
        window: int,
        first_step: int,
        sampling_rate: int = 16_000,
    ):
        self.buckets = tuple(buckets)
        self.bucket_samples = tuple(bucket.num_samples(sampling_rate) for bucket in buckets)
        self.num_samples = num_samples.reshape(-1)
        self.sampling_rate = sampling_rate
        self.window = window
        self.first_step = first_step
        generator = np.random.Philox(np.random.SeedSequence([seed, window]))
        batches = self._batches(num_samples, generator)
        self._batches_in_order = [batches[index] for index in random_permutation(generator, len(batches))]

    def _batches(self, num_samples: np.ndarray, generator: np.random.Philox) -> list[tuple[int, np.ndarray]]:
        readers, count = num_samples.shape
        own_bucket = np.searchsorted(self.bucket_samples, num_samples)
        noise = generator.random_raw(readers * count).reshape(readers, count)
        order = np.lexsort((noise, -own_bucket), axis=-1)
        # The bucket that holds the n-th of every reader; it never grows with n.
        bucket_of_rank = np.take_along_axis(own_bucket, order, axis=-1).max(axis=0)
        numbered = order + count * np.arange(readers)[:, None]
        batches, rank = [], 0
        while rank < count:
            index = int(bucket_of_rank[rank])
            share = self.buckets[index].batch_size // readers
            rows = np.full((readers, share), EMPTY_ROW, np.int64)
            chosen = numbered[:, rank : rank + share]
            rows[:, : chosen.shape[1]] = chosen
            batches.append((index, rows.reshape(-1)))
            rank += share
        return batches

    @property
    def steps(self) -> range:
        """The steps that the window is good for."""
        return range(self.first_step, self.first_step + len(self._batches_in_order))

    @property
    def batches_per_bucket(self) -> tuple[int, ...]:
        """How many batches of the window each bucket has."""
        counts = np.bincount([index for index, _ in self._batches_in_order], minlength=len(self.buckets))
        return tuple(counts.tolist())

    def batch(self, step: int) -> PlannedBatch:
        """The batch of ``step``; its ``epoch`` is the number of the window.

        Raises:
            IndexError: when it is not one of the window.
        """
        if step not in self.steps:
            raise IndexError(f"step {step} is not one of {self.steps}")
        index, rows = self._batches_in_order[step - self.first_step]
        return PlannedBatch(step, self.window, index, rows)


class StreamPlan:
    """The steps of a stream, as far as its windows have been planned.

    Args:
        buckets: Static shapes, by increasing length.
        readers: Into how many equal parts the stream is cut.
        window_size: Utterances that each reader brings to a window.
        seed: Decides the order of the data.
        sampling_rate: Samples per second.
        seconds_per_batch: The budget of padded audio that buckets were made for; :meth:`summary` says where it is
            exceeded.

    Raises:
        ValueError: when readers cannot share batches, or a window does not fill one.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        readers: int,
        window_size: int,
        seed: int,
        sampling_rate: int = 16_000,
        seconds_per_batch: float | None = None,
    ):
        self.buckets = tuple(buckets)
        self.bucket_samples = tuple(bucket.num_samples(sampling_rate) for bucket in buckets)
        self.readers = readers
        self.window_size = window_size
        self.seed = seed
        self.sampling_rate = sampling_rate
        self.seconds_per_batch = seconds_per_batch
        self._windows: list[WindowPlan] = []
        self._counts = np.zeros(len(buckets), np.int64)
        if any(left >= right for left, right in zip(self.bucket_samples, self.bucket_samples[1:], strict=False)):
            raise ValueError(f"bucket lengths must increase, but are {[bucket.max_seconds for bucket in buckets]} s")
        for bucket in buckets:
            if bucket.batch_size % readers:
                raise ValueError(f"{readers} readers cannot share batches of {bucket.batch_size}; choose a multiple")
            if bucket.batch_size > readers * window_size:
                raise ValueError(
                    f"a shuffle buffer of {readers * window_size} utterances does not fill a batch of "
                    f"{bucket.batch_size}; choose a larger one"
                )

    @property
    def batches_per_bucket(self) -> tuple[int, ...]:
        """Batches of each bucket so far, at least one: any bucket may come next."""
        return tuple(np.maximum(self._counts, 1).tolist())

    def plan_window(
        self, num_samples: Int64[np.ndarray, "readers utterances"], *, window: int, first_step: int
    ) -> WindowPlan:
        """Plan the next window."""
        planned = WindowPlan(
            num_samples,
            self.buckets,
            seed=self.seed,
            window=window,
            first_step=first_step,
            sampling_rate=self.sampling_rate,
        )
        self._windows.append(planned)
        self._counts += np.array(planned.batches_per_bucket)
        return planned

    def forget(self, step: int) -> None:
        """Drop the windows whose steps all lie before ``step``."""
        self._windows = [window for window in self._windows if window.steps.stop > step]

    def batch(self, step: int) -> PlannedBatch:
        """The batch of one of the latest steps.

        Raises:
            IndexError: when it is none of the windows in use.
        """
        for window in self._windows:
            if step in window.steps:
                return window.batch(step)
        raise IndexError(f"step {step} is in no window that has been read, or in one of long ago")

    def buckets_in_order(self, step: int) -> list[int]:
        """All buckets: any may come next after ``step`` steps, and later."""
        return list(range(len(self.buckets)))

    def batches_between(self, first: int, last: int) -> np.ndarray:
        """How many of the steps ``first`` to ``last - 1`` will use each bucket, if they are like those seen so far."""
        counts = np.array(self.batches_per_bucket)
        return (last - first) * counts / counts.sum()

    def summary(self) -> str:
        """The shapes, in a few lines."""
        lines = [
            f"a stream, shuffled {self.readers * self.window_size} utterances at a time; parts that are read on their "
            f"own: {self.readers}"
        ]
        lines += [f"  up to {b.max_seconds:g} s: {b.described(self.seconds_per_batch)}" for b in self.buckets]
        return "\n".join(lines)
