"""Which utterances make up which step: a pure function of the seed and the step."""

import collections
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from speech_flax.data.buckets import Bucket

EMPTY_ROW = -1


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedBatch:
    """Rows of one step.

    ``row_indices`` numbers the utterances, -1 for an empty row; its length is the batch size of the bucket, over all
    devices and hosts.
    """

    step: int
    epoch: int
    bucket_index: int
    row_indices: Int64[np.ndarray, "batch"]


class BatchPlan:
    """Batches of utterances of similar length, for any number of epochs.

    Every epoch visits every utterance once. With ``shuffle``, utterances are drawn anew into batches and the batches
    are put in a new order every epoch; without, batches are the same in each, in the order of the data. What does not
    fill a batch of its bucket joins the next longer bucket where that costs less padding than empty rows.

    ``batch(step)`` depends on the constructor's arguments and the step alone, not on earlier calls, so that training
    resumes at any step without a saved position; the random numbers are raw output of a counter-based generator
    (Philox), which no version of NumPy changes. Safe to call from several threads.

    Args:
        num_samples: Length of every utterance in samples; 0 when unknown, as for a file that cannot be read.
        buckets: Static shapes, by increasing length.
        seed: Decides the order of the data.
        shuffle: False for evaluation.
        sampling_rate: Samples per second.
        seconds_per_batch: The budget of padded audio that buckets were made for; :meth:`summary` says where it is
            exceeded.

    Raises:
        ValueError: without utterances or buckets, or when an utterance is longer than the longest bucket.
    """

    def __init__(
        self,
        num_samples: Sequence[int] | Int[np.ndarray, "utterances"],
        buckets: Sequence[Bucket],
        *,
        seed: int = 0,
        shuffle: bool = True,
        sampling_rate: int = 16_000,
        seconds_per_batch: float | None = None,
    ):
        lengths = np.asarray(num_samples, np.int64)
        if lengths.size == 0:
            raise ValueError("there are no utterances to make batches of")
        if not buckets:
            raise ValueError("there are no length buckets to make batches of")
        self.buckets = tuple(buckets)
        self.bucket_samples = tuple(bucket.num_samples(sampling_rate) for bucket in buckets)
        if any(left >= right for left, right in zip(self.bucket_samples, self.bucket_samples[1:], strict=False)):
            raise ValueError(f"bucket lengths must increase, but are {[bucket.max_seconds for bucket in buckets]} s")
        too_long = int((lengths > self.bucket_samples[-1]).sum())
        if too_long:
            raise ValueError(
                f"{too_long} utterances are longer than the longest bucket, {buckets[-1].max_seconds:g} s (the longest "
                f"has {lengths.max() / sampling_rate:.1f} s); drop them with max_seconds or add a longer bucket"
            )
        self.num_samples = lengths
        self.seed = seed
        self.shuffle = shuffle
        self.sampling_rate = sampling_rate
        self.seconds_per_batch = seconds_per_batch
        own_bucket = np.searchsorted(self.bucket_samples, lengths)
        self._members = [np.flatnonzero(own_bucket == index) for index in range(len(buckets))]
        self._layout = _epoch_layout([members.size for members in self._members], self.buckets)
        self._epochs: collections.OrderedDict[int, tuple[np.ndarray, list[np.ndarray]]] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that visit every utterance once."""
        return sum(batches for _, batches in self._layout)

    @property
    def num_utterances(self) -> int:
        """Number of utterances of one epoch."""
        return self.num_samples.size

    @property
    def batches_per_bucket(self) -> tuple[int, ...]:
        """How many batches of one epoch each bucket has."""
        return tuple(batches for _, batches in self._layout)

    @property
    def padding_fraction(self) -> float:
        """Share of the samples of one epoch's batches that are padding, empty rows included."""
        shapes = zip(self.batches_per_bucket, self.buckets, self.bucket_samples, strict=True)
        total = sum(batches * bucket.batch_size * samples for batches, bucket, samples in shapes)
        return 1.0 - float(self.num_samples.sum()) / total

    def batch(self, step: int) -> PlannedBatch:
        """The batch of ``step`` (0, 1, ...).

        Raises:
            IndexError: when ``step`` is negative.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        order, rows = self._epoch(epoch if self.shuffle else 0)
        slot = int(order[position])
        ends = np.cumsum(self.batches_per_bucket)
        index = int(np.searchsorted(ends, slot, side="right"))
        number = slot - (int(ends[index - 1]) if index else 0)
        size = self.buckets[index].batch_size
        chosen = rows[index][number * size : (number + 1) * size]
        filled = np.full(size, EMPTY_ROW, np.int64)
        filled[: chosen.size] = chosen
        return PlannedBatch(step, epoch, index, filled)

    def buckets_in_order(self, step: int) -> list[int]:
        """The buckets that have batches, by when the steps from ``step`` on first use them."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order, _ = self._epoch(epoch if self.shuffle else 0)
        used = np.searchsorted(np.cumsum(self.batches_per_bucket), np.roll(order, -position), side="right")
        buckets, first_uses = np.unique(used, return_index=True)
        return buckets[np.argsort(first_uses)].tolist()

    def batches_between(self, first: int, last: int) -> Int64[np.ndarray, "buckets"]:
        """How many of the steps ``first`` to ``last - 1`` use each bucket."""
        counts = np.zeros(len(self.buckets), np.int64)
        ends = np.cumsum(self.batches_per_bucket)
        for epoch in range(first // self.steps_per_epoch, -(-last // self.steps_per_epoch)):
            begin, end = (
                min(max(step - epoch * self.steps_per_epoch, 0), self.steps_per_epoch) for step in (first, last)
            )
            if end - begin == self.steps_per_epoch:
                counts += np.array(self.batches_per_bucket)
            else:
                order, _ = self._epoch(epoch if self.shuffle else 0)
                slots = np.searchsorted(ends, order[begin:end], side="right")
                counts += np.bincount(slots, minlength=counts.size)
        return counts

    def summary(self) -> str:
        """The plan in a few lines: shapes, batches per epoch, padding."""
        seconds = self.num_samples.sum() / self.sampling_rate
        lines = [
            f"{self.num_utterances} utterances, {seconds / 3600:.2f} h; {self.steps_per_epoch} steps per epoch, "
            f"{self.padding_fraction:.1%} padding"
        ]
        for bucket, members, batches in zip(self.buckets, self._members, self.batches_per_bucket, strict=True):
            described = bucket.described(self.seconds_per_batch)
            lines.append(f"  up to {bucket.max_seconds:g} s: {members.size} utterances, {batches} {described}")
        return "\n".join(lines)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Order of the batch slots, and the utterances of every bucket in the order in which its batches take them.

        The two latest epochs are kept: reading ahead crosses the border between them.
        """
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._arrange(epoch)
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _arrange(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        generator = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        rows, carried = [], np.zeros(0, np.int64)
        for members, (own, _) in zip(self._members, self._layout, strict=True):
            joined = np.concatenate([members, carried])
            if self.shuffle:
                joined = joined[random_permutation(generator, joined.size)]
            rows.append(joined[:own])
            carried = joined[own:]
        steps = self.steps_per_epoch
        return (random_permutation(generator, steps) if self.shuffle else np.arange(steps)), rows

    def __getstate__(self) -> dict:
        """Pickles for worker processes, without the lock and the arranged epochs."""
        return {**self.__dict__, "_lock": None, "_epochs": collections.OrderedDict()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def random_permutation(generator: np.random.Philox, size: int) -> Int64[np.ndarray, "size"]:
    """The numbers below ``size`` in random order, the same in every version of NumPy."""
    return np.argsort(generator.random_raw(size), kind="stable")


def _epoch_layout(counts: Sequence[int], buckets: Sequence[Bucket]) -> list[tuple[int, int]]:
    """Per bucket: how many utterances its batches take (the rest is carried up), and in how many batches."""
    layout, carried = [], 0
    for index, (count, bucket) in enumerate(zip(counts, buckets, strict=True)):
        total = count + carried
        rest = total % bucket.batch_size
        longer = buckets[index + 1 : index + 2]
        carries = bool(longer) and rest * longer[0].max_seconds <= bucket.batch_size * bucket.max_seconds
        carried = rest if carries else 0
        layout.append((total - carried, -(-(total - carried) // bucket.batch_size)))
    return layout
