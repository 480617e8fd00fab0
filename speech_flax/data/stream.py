"""Utterances of a stream: shards in random order, dealt out to readers, cut into windows."""

import dataclasses
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from speech_flax.audio.decoding import AudioError, audio_duration
from speech_flax.data.buckets import duration_samples
from speech_flax.data.plan import random_permutation
from speech_flax.data.shards import Shards
from speech_flax.data.sources import (
    AUDIO_COLUMNS,
    TEXT_COLUMNS,
    DataSource,
    Utterance,
    decode,
    encoded_audio,
    normalized,
)
from speech_flax.data.speed import change_speed
from speech_flax.data.tables import SourceError, choose_column

logger = logging.getLogger(__name__)

#: Rows that are looked at before a run: enough to see that audio can be read and how transcripts are written.
SAMPLE_ROWS = 32

#: Where a reader stands: epoch, its how many-th shard of that epoch, and utterances taken from that shard.
Position = tuple[int, int, int]
BEGINNING: Position = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class StreamedUtterance:
    """One utterance at one speed; ``audio`` is the cell of the audio column, ``num_samples`` 0 for a bad file."""

    id: str
    text: str
    audio: Any
    speed: float
    num_samples: int


@dataclasses.dataclass(frozen=True)
class ReaderWindow:
    """What one reader brings to a window, and where it stands then."""

    utterances: list[StreamedUtterance]
    end: Position


class Stream:
    """Reads the utterances of ``shards`` window by window, for some of ``readers``.

    In every epoch the shards are put in a random order, by seed and epoch, and dealt out: the first to reader 0, the
    second to reader 1, and so on. A reader takes its shards one after the other, row by row, and begins its next epoch
    when it has read them all, whether or not others have. What a reader brings to a window therefore depends on the
    shards, the seed and the number of readers, and not on which process it runs in.

    Args:
        source: What rows mean and which are left out.
        shards: Where rows come from.
        readers: Number of parts of the stream.
        window_size: Utterances per reader and window.
        seed: Decides the order of the shards.
        speeds: Factors at which every row is heard, one after the other.
        refuse: Says why an utterance is to be left out: (transcript, samples) to a reason, or ``None``.

    Raises:
        SourceError: for columns that do not exist, or with more readers than shards.
    """

    def __init__(
        self,
        source: DataSource,
        shards: Shards,
        *,
        readers: int,
        window_size: int,
        seed: int,
        speeds: Sequence[float] = (1.0,),
        refuse: Callable[[str, int], str | None] = lambda text, num_samples: None,
    ):
        if readers > len(shards):
            raise SourceError(
                f"{shards.origin} has {len(shards)} shard(s), fewer than data.stream_readers = {readers}: each "
                "reader needs its own"
            )
        columns = shards.columns
        self._audio = choose_column(columns, source.audio_column, AUDIO_COLUMNS, "audio_column", shards.origin)
        self._text = choose_column(columns, source.text_column, TEXT_COLUMNS, "text_column", shards.origin)
        for field in ("id_column", "duration_column"):
            if (column := getattr(source, field)) is not None:
                choose_column(columns, column, (), field, shards.origin)
        self.source = source
        self.shards = shards
        self._directory = Path(source.audio_directory or shards.directory).expanduser()
        self._readers = readers
        self._window_size = window_size
        self._seed = seed
        self._speeds = tuple(speeds)
        self._refuse = refuse
        self._left_out: Counter[str] = Counter()
        self._open: dict[int, tuple[Position, Iterator[tuple[Position, StreamedUtterance]]]] = {}

    def read(self, reader: int, start: Position, stop: threading.Event, bar: tqdm | None = None) -> ReaderWindow:
        """The next window of one reader, from where it stands at the ``start``. To read on where its last window ended
        costs nothing; elsewhere, at most the beginning of one shard is read again. Readers may read at the same time.

        Args:
            reader: Which one.
            start: Where its window begins.
            stop: Once it is set, the window is cut short.
            bar: Told of every utterance.

        Raises:
            SourceError: when a whole epoch of the reader has no utterance, or a shard cannot be read.
        """
        position, utterances = self._open.pop(reader, (None, None))
        if position != start:
            utterances = self._utterances(reader, start)
        taken = []
        for pair in utterances:
            taken.append(pair)
            if bar is not None:
                bar.update()
            if len(taken) == self._window_size or stop.is_set():
                break
        end = taken[-1][0]
        self._open[reader] = (end, utterances)
        return ReaderWindow([utterance for _, utterance in taken], end)

    def sample(self) -> list[StreamedUtterance]:
        """The first rows of the first shard that are not left out."""
        rows = (self._row(0, number, record, 1.0) for number, record in self.shards.rows(0))
        return [row for row, _ in zip(filter(None, rows), range(SAMPLE_ROWS), strict=False)]

    def decode(self, utterance: StreamedUtterance) -> Float32[np.ndarray, "samples"]:
        """The audio of an utterance at its speed.

        Raises:
            AudioError: when it cannot be decoded.
        """
        encoded = encoded_audio(utterance.audio, self._directory)
        return change_speed(decode(Utterance(utterance.id, encoded, utterance.text), self.source), utterance.speed)

    def _utterances(self, reader: int, start: Position) -> Iterator[tuple[Position, StreamedUtterance]]:
        """Utterances without end, each with the position behind it."""
        epoch, place, taken = start
        while True:
            generator = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
            own_shards = random_permutation(generator, len(self.shards))[reader :: self._readers].tolist()
            anything = (place, taken) != (0, 0)
            for number in range(place, len(own_shards)):
                for behind, utterance in self._of_shard(own_shards[number], taken):
                    anything = True
                    yield (epoch, number, behind), utterance
                taken = 0
            if not anything:
                reasons = ", ".join(f"{count} {reason}" for reason, count in self._left_out.items())
                raise SourceError(
                    f"an epoch of {self.shards.origin} has no utterance to train on ({reasons or 'empty'})"
                )
            epoch, place = epoch + 1, 0

    def _of_shard(self, shard: int, taken: int) -> Iterator[tuple[int, StreamedUtterance]]:
        first, again = divmod(taken, len(self._speeds))
        for number, record in self.shards.rows(shard, first):
            for index, speed in enumerate(self._speeds):
                if number == first and index < again:
                    continue
                utterance = self._row(shard, number, record, speed)
                if utterance is not None:
                    yield number * len(self._speeds) + index + 1, utterance

    def _row(self, shard: int, number: int, record: dict[str, Any], speed: float) -> StreamedUtterance | None:
        """One row as an utterance, or ``None`` when it is left out."""
        source, text = self.source, record.get(self._text)
        if text is not None and not isinstance(text, str):
            raise SourceError(
                f"column {self._text!r} of {self.shards.origin} holds {type(text).__name__} values such as {text!r}, "
                "not text"
            )
        text = normalized(text or "", source)
        seconds = self._seconds(record) if text else 0.0
        if not text:
            reason = "with an empty transcript"
        elif 0 < seconds < source.min_seconds:
            reason = f"shorter than min_seconds = {source.min_seconds:g}"
        elif source.max_seconds is not None and seconds > source.max_seconds:
            reason = f"longer than max_seconds = {source.max_seconds:g}"
        else:
            num_samples = int(duration_samples(np.array([seconds / speed]))[0])
            reason = self._refuse(text, num_samples)
        name = self._name(shard, number, record)
        if reason is not None:
            self._leave_out(name, reason)
            return None
        return StreamedUtterance(
            name if speed == 1 else f"{name}@{speed:g}", text, record[self._audio], speed, num_samples
        )

    def _leave_out(self, name: str, reason: str) -> None:
        """Count it, and say so once for one, ten, a hundred, ... of them."""
        self._left_out[reason] += 1
        count = self._left_out[reason]
        if str(count).rstrip("0") == "1":
            logger.warning("%s: left out %d so far %s, the last is %s", self.shards.origin, count, reason, name)

    def _seconds(self, record: dict[str, Any]) -> float:
        """Seconds of a row's audio; 0 when its header cannot be read."""
        if (column := self.source.duration_column) is not None:
            value = record[column]
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise SourceError(f"column {column!r} of {self.shards.origin} holds {value!r}, not seconds")
            return float(value)
        try:
            return audio_duration(encoded_audio(record.get(self._audio), self._directory))
        except (AudioError, OSError):
            return 0.0

    def _name(self, shard: int, number: int, record: dict[str, Any]) -> str:
        """The id column, a sample's name in a tar shard, the path of the audio, or the place in the stream."""
        if self.source.id_column is not None:
            return str(record[self.source.id_column])
        audio = record.get(self._audio)
        path = audio.get("path") if isinstance(audio, dict) else audio
        known = record.get("__key__") or (path if isinstance(path, str) else None)
        return known or f"{self.source.split}-{shard:05d}-{number:07d}"
