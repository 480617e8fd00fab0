"""Batches of audio and labels, read ahead of the device in parallel, in the order of a plan."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from numpy.typing import DTypeLike
from tqdm import tqdm

from speech_flax.audio.decoding import AudioError
from speech_flax.data.plan import EMPTY_ROW, BatchPlan, PlannedBatch
from speech_flax.data.read_ahead import read_ahead, reading_threads
from speech_flax.data.sources import Utterances
from speech_flax.data.speed import SpeedPerturbed
from speech_flax.data.waveform_cache import WaveformCache

IGNORED_LABEL = -100
# A decoded file may be this much longer than planned (rounded durations, resampling) and is cut; beyond, it is bad.
_MAX_EXCESS_SECONDS = 0.1
LABEL_MULTIPLE = 8


@runtime_checkable
class LabelEncoder(Protocol):
    """Turns the label of an utterance, a transcript for instance, into numbers; a tokenizer is one."""

    def encode(self, text: str) -> Sequence[int] | Sequence[float]:
        """The numbers of one label."""


@runtime_checkable
class RowsToRead(Protocol):
    """Utterances by number."""

    def ids(self) -> Sequence[str]:
        """Names of all utterances."""

    def texts(self) -> Sequence[str]:
        """Transcripts or other labels of all utterances."""

    def waveform(self, index: int) -> Float32[np.ndarray, "samples"]:
        """Decoded audio of one utterance."""


@runtime_checkable
class PlanToRead(Protocol):
    """Which of these utterances make up which step, and how long they are to be."""

    bucket_samples: tuple[int, ...]
    num_samples: Int64[np.ndarray, "utterances"]
    sampling_rate: int

    def batch(self, step: int) -> PlannedBatch:
        """The batch of ``step``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One step's rows on this process; all shapes are those of the length bucket.

    ``waveforms`` are mono at the plan's rate and zero past ``sample_lengths``; ``labels`` are -100 past
    ``label_lengths``. ``valid`` is false for empty rows and for files that could not be read, whose messages, beginning
    with the utterance's id, are in ``bad``; such rows are all padding. ``ids`` and ``texts`` are empty in empty rows.
    """

    step: int
    waveforms: Float32[np.ndarray, "rows samples"]
    sample_lengths: Int32[np.ndarray, "rows"]
    labels: Int32[np.ndarray, "rows max_labels"] | Float32[np.ndarray, "rows max_labels"]
    label_lengths: Int32[np.ndarray, "rows"]
    valid: Bool[np.ndarray, "rows"]
    ids: list[str]
    texts: list[str]
    bad: list[str]


class BatchLoader:
    """Reads the batches of a plan: audio decoded and padded, transcripts as labels.

    Batches are made by ``num_workers`` threads, or, with ``num_processes``, by that many processes of one thread
    each. Threads share the cache and start at once; decoding and resampling leave Python's lock to them. The order is
    the plan's whatever their number.

    Args:
        plan: Which utterances make up which step.
        utterances: What the plan's rows number.
        encoder: Turns transcripts, or labels of another kind, into numbers.
        label_dtype: Type of these numbers.
        shard: (index, count) of this process: it gets that one of ``count`` equal consecutive parts of every batch.
        num_workers: Threads that read ahead.
        num_processes: Worker processes that read instead of threads.
        cache_decoded_mb: Memory for decoded audio that is kept between epochs, in MiB, over all workers.

    Raises:
        ValueError: when ``count`` does not divide a batch size, or plan and utterances differ in number.
    """

    def __init__(
        self,
        plan: BatchPlan,
        utterances: Utterances | SpeedPerturbed,
        encoder: LabelEncoder,
        *,
        shard: tuple[int, int] = (0, 1),
        num_workers: int = 2,
        num_processes: int = 0,
        cache_decoded_mb: int = 0,
        label_dtype: DTypeLike = np.int32,
    ):
        if plan.num_utterances != len(utterances):
            raise ValueError(f"the plan is for {plan.num_utterances} utterances, but there are {len(utterances)}")
        if num_workers < 1 or num_processes < 0:
            raise ValueError(f"{num_workers} worker threads and {num_processes} processes cannot read; ask for one")
        index, count = shard
        for bucket in plan.buckets:
            if bucket.batch_size % count:
                raise ValueError(f"{count} processes cannot share batches of {bucket.batch_size}; choose a multiple")
        self.plan = plan
        self.label_widths = label_widths(plan, utterances.texts(), encoder)
        cache = WaveformCache(cache_decoded_mb * 2**20 // max(num_processes, 1))
        self._reader = BatchReader(
            plan, utterances, encoder, self.label_widths, np.dtype(label_dtype), index, count, cache
        )
        self._num_workers = num_workers
        self._num_processes = num_processes

    def empty_batch(self, bucket_index: int) -> Batch:
        """A batch of the bucket's shape without utterances, to compile for."""
        size = self.plan.buckets[bucket_index].batch_size
        return self._reader.read(0, bucket_index, np.full(size, EMPTY_ROW))

    def position(self, step: int) -> None:
        """What must be known to go on after ``step`` steps: nothing but their number."""

    def restore(self, position: None) -> None:
        """Go on at a position: the step says it all."""

    def batches(self, first_step: int = 0, num_steps: int | None = None) -> Iterator[Batch]:
        """The batches of steps ``first_step``, ``first_step + 1``, ...; by default, one epoch of them.

        Closing the iterator, or leaving a loop over it, ends the reading.

        Raises:
            OSError, ValueError: whatever goes wrong other than an unreadable audio file, at the step where it does.
        """
        num_steps = self.plan.steps_per_epoch if num_steps is None else num_steps
        steps = range(first_step, first_step + num_steps)
        if self._num_processes:
            yield from self._from_processes(steps)
        else:
            with reading_threads(self._num_workers) as pool:
                yield from read_ahead(pool, self._reader, steps, 2 * self._num_workers)

    def _from_processes(self, steps: range) -> Iterator[Batch]:
        import grain  # takes a second, which threads need not wait for

        _let_grain_read_its_flags()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        workers = grain.MultiprocessingOptions(num_workers=self._num_processes, per_worker_buffer_size=2)
        read = grain.MapDataset.range(steps.start, steps.stop).map(self._reader).to_iter_dataset(options)
        iterator = iter(read.mp_prefetch(workers))
        try:
            yield from iterator
        finally:
            iterator.close()


def rows_of_process(row_indices: Int64[np.ndarray, "batch"], shard: tuple[int, int]) -> Int64[np.ndarray, "rows"]:
    """The part (index, count) of the rows of a batch that one process reads."""
    index, count = shard
    size = row_indices.size // count
    return row_indices[index * size : (index + 1) * size]


def _let_grain_read_its_flags() -> None:
    """Grain's worker processes read absl flags, which only programs that run under ``absl.app`` have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def load_batches(
    plan: BatchPlan,
    utterances: Utterances | SpeedPerturbed,
    encoder: LabelEncoder,
    first_step: int = 0,
    num_steps: int | None = None,
    **options: object,
) -> Iterator[Batch]:
    """``BatchLoader(plan, utterances, encoder, **options).batches(first_step, num_steps)``."""
    return BatchLoader(plan, utterances, encoder, **options).batches(first_step, num_steps)


def label_widths(plan: BatchPlan, texts: Sequence[str], encoder: LabelEncoder) -> tuple[int, ...]:
    """Labels per row of every bucket: enough for all utterances that may be in it, a multiple of 8."""
    progress = tqdm(texts, desc="labels of transcripts", delay=2, disable=None, leave=False)
    lengths = np.array([len(encoder.encode(text)) for text in progress])
    own_bucket = np.searchsorted(plan.bucket_samples, plan.num_samples)
    longest = np.ones(len(plan.buckets), np.int64)
    np.maximum.at(longest, own_bucket, lengths)
    # What does not fill a batch joins a longer bucket, so that each must be wide enough for all shorter ones.
    longest = np.maximum.accumulate(longest)
    return tuple(int(-(-width // LABEL_MULTIPLE) * LABEL_MULTIPLE) for width in longest)


@dataclasses.dataclass(frozen=True, eq=False)
class BatchReader:
    """Makes the batch of one step: this process's part of the rows. Runs in worker threads or processes."""

    plan: PlanToRead
    utterances: RowsToRead
    encoder: LabelEncoder
    label_widths: tuple[int, ...]
    label_dtype: np.dtype
    shard_index: int
    shard_count: int
    cache: WaveformCache

    def __call__(self, step: int) -> Batch:
        planned = self.plan.batch(int(step))
        return self.read(planned.step, planned.bucket_index, planned.row_indices)

    def read(self, step: int, bucket_index: int, row_indices: np.ndarray) -> Batch:
        """This process's part of the rows."""
        rows = rows_of_process(row_indices, (self.shard_index, self.shard_count))
        size = rows.size
        batch = Batch(
            step=step,
            waveforms=np.zeros((size, self.plan.bucket_samples[bucket_index]), np.float32),
            sample_lengths=np.zeros(size, np.int32),
            labels=np.full((size, self.label_widths[bucket_index]), IGNORED_LABEL, self.label_dtype),
            label_lengths=np.zeros(size, np.int32),
            valid=np.zeros(size, bool),
            ids=[""] * size,
            texts=[""] * size,
            bad=[],
        )
        for row, index in enumerate(rows.tolist()):
            if index != EMPTY_ROW:
                self._fill(batch, row, index)
        return batch

    def _fill(self, batch: Batch, row: int, index: int) -> None:
        batch.ids[row] = self.utterances.ids()[index]
        batch.texts[row] = self.utterances.texts()[index]
        try:
            waveform = self._waveform(index)[: batch.waveforms.shape[1]]
        except (AudioError, OSError) as error:
            message = str(error)
            batch.bad.append(message if batch.ids[row] in message else f"{batch.ids[row]}: {message}")
            return
        labels = self.encoder.encode(batch.texts[row])
        batch.waveforms[row, : waveform.size] = waveform
        batch.sample_lengths[row] = waveform.size
        batch.labels[row, : len(labels)] = labels
        batch.label_lengths[row] = len(labels)
        batch.valid[row] = True

    def _waveform(self, index: int) -> np.ndarray:
        waveform = self.cache.get(index)
        if waveform is None:
            waveform = self.utterances.waveform(index)
            planned, actual = (n / self.plan.sampling_rate for n in (self.plan.num_samples[index], waveform.size))
            if actual > planned + _MAX_EXCESS_SECONDS:
                raise AudioError(f"is {actual:.1f} s long, but its batch was planned for {planned:.1f} s")
            self.cache.put(index, waveform)
        return waveform
