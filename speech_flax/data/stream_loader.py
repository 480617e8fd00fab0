"""Batches of a stream, read ahead of the device, and the position to go on from."""

import dataclasses
import math
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy.typing import DTypeLike
from tqdm import tqdm

from speech_flax.data.buckets import Bucket
from speech_flax.data.loader import LABEL_MULTIPLE, Batch, BatchReader, LabelEncoder, PlanToRead, rows_of_process
from speech_flax.data.plan import EMPTY_ROW
from speech_flax.data.read_ahead import read_ahead, reading_threads
from speech_flax.data.shards import Shards
from speech_flax.data.sources import DataSource
from speech_flax.data.stream import BEGINNING, Position, ReaderWindow, Stream, StreamedUtterance
from speech_flax.data.stream_plan import StreamPlan, WindowPlan
from speech_flax.data.tables import SourceError
from speech_flax.data.waveform_cache import WaveformCache

#: Threads that read shards at a time, each for another reader.
_MOST_READING = 16


@dataclasses.dataclass(frozen=True)
class WindowStart:
    """Where a window begins: its number, its first step, and where every reader stands. Plain data in a checkpoint."""

    window: int
    first_step: int
    readers: tuple[Position, ...]

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "WindowStart":
        """What :meth:`record` gave, after its way through JSON."""
        return cls(record["window"], record["first_step"], tuple(tuple(position) for position in record["readers"]))


class StreamLoader:
    """Reads the batches of a stream. The next window is read while one is trained on.

    Which utterances make up which step depends on the shards and on ``plan``: not on the number of processes. A process
    reads the windows of those readers whose rows it holds, and decodes its own rows only; what it needs to know of the
    other utterances, their lengths, the processes tell each other once per window.

    Args:
        plan: Shapes and seed; it learns of every window that is read.
        source: What rows mean.
        shards: Where they come from.
        encoder: Turns transcripts into numbers.
        labels_per_second: Most labels per second of a bucket's length; utterances with more are left out.
        speeds: Factors at which every row is heard.
        label_dtype: Type of labels.
        shard: (index, count) of this process: it gets that one of ``count`` equal consecutive parts of every batch.
        num_workers: Threads that decode ahead.
        exchange: Gives what every process passed to its call, JSON values, to all of them. Called in the thread that
            takes the batches, by every process at the same step.
    """

    def __init__(
        self,
        plan: StreamPlan,
        source: DataSource,
        shards: Shards,
        encoder: LabelEncoder,
        *,
        labels_per_second: float,
        speeds: Sequence[float] = (1.0,),
        label_dtype: DTypeLike = np.int32,
        shard: tuple[int, int] = (0, 1),
        num_workers: int = 2,
        exchange: Callable[[Any], list[Any]] = lambda own: [own],
    ):
        self.plan = plan
        self.label_widths = streamed_label_widths(plan.buckets, labels_per_second)
        self._encoder = encoder
        self._label_dtype = np.dtype(label_dtype)
        self._shard = shard
        self._num_workers = num_workers
        self._exchange = exchange
        index, count = shard
        first, last = index * plan.readers // count, math.ceil((index + 1) * plan.readers / count)
        self._own_readers = range(first, last)
        self._stream = Stream(
            source,
            shards,
            readers=plan.readers,
            window_size=plan.window_size,
            seed=plan.seed,
            speeds=speeds,
            refuse=self._refuse,
        )
        self._starts = deque([WindowStart(0, 0, (BEGINNING,) * plan.readers)])

    def empty_batch(self, bucket_index: int) -> Batch:
        """A batch of the bucket's shape without utterances, to compile for."""
        size = self.plan.buckets[bucket_index].batch_size
        nothing = WindowPlan(np.zeros((1, 0), np.int64), self.plan.buckets, seed=0, window=0, first_step=0)
        return self._reader(nothing, []).read(0, bucket_index, np.full(size, EMPTY_ROW))

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint must keep to go on after ``step`` steps, one of the latest."""
        return next(start for start in reversed(self._starts) if start.first_step <= step).record()

    def restore(self, position: dict[str, Any]) -> None:
        """Begin at the window of a :meth:`position`."""
        self._starts.clear()
        self._starts.append(WindowStart.of_record(position))

    def batches(self, first_step: int, num_steps: int) -> Iterator[Batch]:
        """The batches of steps ``first_step``, ``first_step + 1``, ... Closing the iterator ends the reading.

        Raises:
            OSError, ValueError: whatever goes wrong other than an unreadable audio file, or when ``first_step`` lies
                before the position that the loader was restored at, or before windows that it has forgotten.
        """
        while self._starts[-1].first_step > first_step:
            if len(self._starts) == 1:
                raise ValueError(f"the stream stands at step {self._starts[0].first_step}, behind step {first_step}")
            self._starts.pop()
        with reading_threads(self._num_workers) as decoding, self._windows() as windows:
            steps = (partial(reader, step) for reader in windows for step in reader.plan.steps if step >= first_step)
            for batch in read_ahead(decoding, operator.call, islice(steps, num_steps), 2 * self._num_workers):
                self._forget_before(batch)
                yield batch

    def _forget_before(self, batch: Batch) -> None:
        """Windows that lie behind a batch are forgotten, but for the step before, whose metrics come late."""
        self.plan.forget(batch.step - 1)
        while len(self._starts) > 1 and self._starts[1].first_step <= batch.step:
            self._starts.popleft()

    @contextmanager
    def _windows(self) -> Iterator[Iterator[BatchReader]]:
        """Readers of the batches of one window after the other."""
        stop = threading.Event()
        with reading_threads(min(len(self._own_readers), _MOST_READING)) as reading:
            try:
                yield self._window_by_window(reading, stop)
            finally:
                stop.set()

    def _window_by_window(self, reading: ThreadPoolExecutor, stop: threading.Event) -> Iterator[BatchReader]:
        def read(start: WindowStart, bar: tqdm | None = None) -> dict[int, Future[ReaderWindow]]:
            return {r: reading.submit(self._stream.read, r, start.readers[r], stop, bar) for r in self._own_readers}

        start = self._starts[-1]
        with self._progress_bar() as bar:
            arriving = read(start, bar)
            wait(arriving.values())
        while True:
            own = {reader: future.result() for reader, future in arriving.items()}
            everyone = self._from_everyone(own)
            lengths = np.array([everyone[reader][0] for reader in range(self.plan.readers)], np.int64)
            plan = self.plan.plan_window(lengths, window=start.window, first_step=start.first_step)
            ends = tuple(everyone[reader][1] for reader in range(self.plan.readers))
            start = WindowStart(start.window + 1, plan.steps.stop, ends)
            self._starts.append(start)
            arriving = read(start)
            yield self._reader_of(plan, own)

    def _progress_bar(self) -> tqdm:
        """Of the first window, which is waited for; those that follow are read while there is something to train on."""
        total = len(self._own_readers) * self.plan.window_size
        return tqdm(total=total, desc="first window of the stream", delay=2, disable=None, leave=False)

    def _from_everyone(self, own: dict[int, ReaderWindow]) -> dict[int, tuple[list[int], Position]]:
        """Lengths and end of every reader's window.

        Raises:
            SourceError: when two processes have read different things with the same reader.
        """
        told = [
            [reader, [utterance.num_samples for utterance in window.utterances], list(window.end)]
            for reader, window in own.items()
        ]
        everyone: dict[int, tuple[list[int], Position]] = {}
        for reader, lengths, end in (entry for process in self._exchange(told) for entry in process):
            heard = lengths, tuple(end)
            if everyone.setdefault(reader, heard) != heard:
                raise SourceError(f"processes do not find the same in the shards of {self._stream.shards.origin}")
        return everyone

    def _reader_of(self, plan: WindowPlan, own: dict[int, ReaderWindow]) -> BatchReader:
        """Reads the window's batches. It keeps this process's utterances alone, since their audio takes room."""
        kept: list[StreamedUtterance | None] = [None] * plan.num_samples.size
        for step in plan.steps:
            for row in rows_of_process(plan.batch(step).row_indices, self._shard).tolist():
                if row != EMPTY_ROW:
                    reader, number = divmod(row, self.plan.window_size)
                    kept[row] = own[reader].utterances[number]
        return self._reader(plan, kept)

    def _reader(self, plan: PlanToRead, utterances: Sequence[StreamedUtterance | None]) -> BatchReader:
        rows = WindowUtterances(self._stream, utterances)
        index, count = self._shard
        kept = WaveformCache(0)
        return BatchReader(plan, rows, self._encoder, self.label_widths, self._label_dtype, index, count, kept)

    def _refuse(self, text: str, num_samples: int) -> str | None:
        """Why an utterance has no place in any bucket."""
        index = int(np.searchsorted(self.plan.bucket_samples, num_samples))
        if index == len(self.plan.buckets):
            return f"longer than the longest bucket, {self.plan.buckets[-1].max_seconds:g} s"
        if len(self._encoder.encode(text)) > self.label_widths[index]:
            return f"with more than {self.label_widths[index]} labels in {self.plan.buckets[index].max_seconds:g} s"
        return None


class WindowUtterances:
    """The utterances of a window by their number in it; those of other processes are ``None``."""

    def __init__(self, stream: Stream, utterances: Sequence[StreamedUtterance | None]):
        self._stream = stream
        self._utterances = utterances
        self._ids = [utterance.id if utterance else "" for utterance in utterances]
        self._texts = [utterance.text if utterance else "" for utterance in utterances]

    def ids(self) -> Sequence[str]:
        """Names; not a copy."""
        return self._ids

    def texts(self) -> Sequence[str]:
        """Transcripts; not a copy."""
        return self._texts

    def waveform(self, index: int) -> Float32[np.ndarray, "samples"]:
        """Decoded audio of one utterance.

        Raises:
            AudioError: when it cannot be decoded.
        """
        return self._stream.decode(self._utterances[index])


def streamed_label_widths(buckets: Sequence[Bucket], labels_per_second: float) -> tuple[int, ...]:
    """Labels per row of every bucket, where transcripts are not known beforehand: a multiple of 8."""
    most = (math.ceil(bucket.max_seconds * labels_per_second) for bucket in buckets)
    return tuple(-(-count // LABEL_MULTIPLE) * LABEL_MULTIPLE for count in most)
