"""Sources of utterances: audio and transcripts from local files or the hub, by random access."""

import dataclasses
import json
import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64

from speech_flax.audio.decoding import AudioError, load_audio
from speech_flax.data.durations import file_identity, scan_durations
from speech_flax.data.shards import first_rows
from speech_flax.data.tables import SourceError, Table, read_table
from speech_flax.data.tar_shards import read_slice

logger = logging.getLogger(__name__)

AUDIO_COLUMNS = ("audio", "file_name", "path", "file", "audio_filepath", "audio_path")
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Utterances of one split of a data set.

    Args:
        path: A CSV, TSV, JSON Lines, Parquet, Arrow or tar file; a directory with metadata.csv, such files, or a saved
            data set; or the id of a data set on the Hugging Face hub; or Parquet files in a bucket (gs://).
        split: Which part of it: a column "split", a folder or file of that name, or the hub's own splits, of which
            several can be joined with "+".
        name: Configuration of a hub data set, a language for instance.
        audio_column: Column with paths, encoded bytes or the Audio feature; none takes the first of audio, file_name,
            path, file, audio_filepath, audio_path.
        text_column: Column with transcripts; none takes the first of text, transcription, sentence, transcript.
        label_column: Column with labels, for tasks other than transcription; none takes the first of the usual names.
        id_column: Column that names utterances; none takes their audio paths.
        duration_column: Column with durations in seconds; none reads them from the audio headers.
        audio_directory: What relative audio paths start from; none starts at the manifest.
        min_seconds: Shorter utterances are dropped.
        max_seconds: Longer utterances are dropped.
        limit: Only the first rows, this many.
        streaming: Read training data shard after shard, without an index of them and without downloading them first;
            of other data, fetch the first ``limit`` rows and no more.
        trim_silence_db: Cut leading and trailing audio that is this many decibels below the peak.
        case: Letter case of transcripts.
        punctuation: Whether punctuation of transcripts is kept.
        keep_characters: Punctuation that is kept when the rest is removed.
    """

    path: str
    split: str = "train"
    name: str | None = None
    audio_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None
    duration_column: str | None = None
    audio_directory: str | None = None
    min_seconds: float = 0.0
    max_seconds: float | None = None
    limit: int | None = None
    streaming: bool = False
    trim_silence_db: float | None = None
    case: Literal["keep", "lower", "upper"] = "keep"
    punctuation: Literal["keep", "remove"] = "keep"
    keep_characters: str = "'"

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of data source {self.path!r} is {self.limit}; it must be at least 1")
        if self.max_seconds is not None and self.max_seconds <= self.min_seconds:
            raise ValueError(
                f"max_seconds of data source {self.path!r} is {self.max_seconds:g}; it must exceed min_seconds, "
                f"which is {self.min_seconds:g}"
            )
        if self.trim_silence_db is not None and self.trim_silence_db <= 0:
            raise ValueError(f"trim_silence_db of {self.path!r} is {self.trim_silence_db:g}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Utterance:
    """``audio`` is the path of a file or the bytes of one; ``text`` the normalised transcript."""

    id: str
    audio: str | bytes
    text: str


class Utterances(Sequence[Utterance]):
    """Random access to the utterances of a source. Made by :func:`open_source`; can be pickled.

    ``dropped`` maps the reason to the ids of the rows that were left out.
    """

    def __init__(self, source: DataSource, table: Table, audio_column: str, texts: list[str], ids: list[str]):
        self.source = source
        self.dropped: dict[str, list[str]] = {}
        self._origin = table.origin
        self._directory = Path(source.audio_directory or table.directory).expanduser()
        self._audio_column = audio_column
        self._audio = table.dataset.select_columns([audio_column])
        self._rows = table.rows
        self._texts = texts
        self._ids = ids
        self._durations: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Utterance:
        return Utterance(self._ids[index], self._encoded(index), self._texts[index])

    def texts(self) -> Sequence[str]:
        """Transcripts of all utterances, normalised; not a copy."""
        return self._texts

    def ids(self) -> Sequence[str]:
        """Names of all utterances; not a copy."""
        return self._ids

    def durations(self, cache: str | Path | None = None) -> Float64[np.ndarray, "utterances"]:
        """Seconds of every utterance: the duration column, or what the audio headers say; 0 where one is unreadable.

        Args:
            cache: File that keeps what was read from headers, by size and time of change of the audio file.
        """
        if self._durations is None:
            self._durations = scan_durations(
                self._encoded,
                self._identities(),
                cache=Path(cache) if cache is not None else None,
                description=self._origin,
            )
        return self._durations

    def waveform(self, index: int) -> Float32[np.ndarray, "samples"]:
        """Decoded audio of one utterance: mono, 16 kHz, silence trimmed if the source says so.

        Raises:
            AudioError: when it cannot be decoded or holds nothing but silence; names the utterance and the cause.
        """
        return decode(self[index], self.source)

    def summary(self) -> str:
        """How many utterances there are, and what was dropped and why, in one line per reason."""
        lines = [f"{len(self)} utterances from split {self.source.split!r} of {self._origin}"]
        for reason, names in self.dropped.items():
            examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"  dropped {len(names)} {reason}: {examples}")
        return "\n".join(lines)

    def _drop(self, reason: str, drop: Bool[np.ndarray, "utterances"]) -> None:
        if not drop.any():
            return
        self.dropped[reason] = [self._ids[index] for index in np.flatnonzero(drop)]
        kept = np.flatnonzero(~drop)
        self._rows = self._rows[kept]
        self._texts = [self._texts[index] for index in kept]
        self._ids = [self._ids[index] for index in kept]
        if self._durations is not None:
            self._durations = self._durations[kept]

    def _encoded(self, index: int) -> str | bytes:
        """Path or bytes of the audio; an empty path when the table holds neither."""
        return encoded_audio(self._audio[int(self._rows[index])][self._audio_column], self._directory)

    def _identities(self) -> list[str]:
        """What changes when the audio of an utterance does: its file, or the files of the table that embeds it."""
        if _is_text(self._audio.features[self._audio_column]):
            return [file_identity(self._encoded(index)) for index in range(len(self))]
        import pyarrow.compute

        if f"{self._audio_column}.shard" in self._audio.flatten().column_names:
            places = (self._audio[int(row)][self._audio_column] for row in self._rows)
            return [f"{file_identity(place['shard'])}|{place['offset']}" for place in places]
        tables = "|".join(file_identity(file["filename"]) for file in self._audio.cache_files)
        flat = self._audio.flatten().with_format("arrow")[:]
        name = (
            f"{self._audio_column}.bytes"
            if f"{self._audio_column}.bytes" in flat.column_names
            else flat.column_names[0]
        )
        binary = not pyarrow.types.is_string(flat[name].type) and not pyarrow.types.is_large_string(flat[name].type)
        embedded = pyarrow.compute.is_valid(flat[name]).to_numpy() & binary
        return [
            (f"{tables}|{row}" if tables else "") if embedded[row] else file_identity(self._encoded(index))
            for index, row in enumerate(self._rows)
        ]


def decode(utterance: Utterance, source: DataSource) -> Float32[np.ndarray, "samples"]:
    """The audio of an utterance of ``source``: mono, 16 kHz, silence trimmed if the source says so.

    Raises:
        AudioError: when it cannot be decoded or holds nothing but silence; names the utterance and the cause.
    """
    waveform = load_audio(utterance.audio, name=utterance.id if isinstance(utterance.audio, bytes) else None)
    if source.trim_silence_db is not None:
        import librosa

        waveform, _ = librosa.effects.trim(waveform, top_db=source.trim_silence_db)
        if waveform.size == 0 or not waveform.any():
            raise AudioError(f"{utterance.id}: holds nothing but silence")
    return waveform


def encoded_audio(value: Any, directory: Path) -> str | bytes:
    """Path or bytes of the audio that a cell of an audio column holds; an empty path when it holds neither."""
    if isinstance(value, dict) and "shard" in value:
        return read_slice(**value)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value:
        return str(directory / value)
    return value or ""


def open_source(
    source: DataSource, *, cache: str | Path | None = None, label_columns: Sequence[str] | None = None
) -> Utterances:
    """The utterances that ``source`` describes. Only the table is read; no audio, unless lengths are limited and there
    is no duration column: then the headers are, or what ``cache`` remembers of them.

    With ``label_columns``, the texts of the utterances are no transcripts but labels: the values of
    ``source.label_column``, or of the first of these columns that exists, as they are; other values than strings in
    JSON.

    Rows with an empty transcript or label and utterances outside ``min_seconds`` to ``max_seconds`` are dropped and
    reported in the log. A file that does not exist or cannot be read stays: it is reported when it is read.

    Raises:
        SourceError: for a path, split or column that does not exist, a malformed table, or when nothing is left.
    """
    if source.streaming and source.limit is not None:
        table = first_rows(source.path, source.split, source.name, source.limit)
    elif source.streaming:
        raise SourceError(
            f"{source.path} is streamed, which would never end for data to evaluate on: set limit to a number of rows"
        )
    else:
        table = read_table(source.path, source.split, source.name)
    if source.limit is not None:
        table = dataclasses.replace(table, rows=table.rows[: source.limit])
    audio_column = table.column(source.audio_column, AUDIO_COLUMNS, "audio_column")
    table = _with_undecoded_audio(table, audio_column)
    if label_columns is None:
        texts = _texts(source, table, table.column(source.text_column, TEXT_COLUMNS, "text_column"))
    else:
        texts = _labels(table, table.column(source.label_column, label_columns, "label_column"))
    ids = _ids(source, table, audio_column)
    utterances = Utterances(source, table, audio_column, texts, ids)
    if source.duration_column is not None:
        utterances._durations = _listed_durations(source, table)
    utterances._drop(
        "with an empty " + ("transcript" if label_columns is None else "label"), np.array([not text for text in texts])
    )
    if source.min_seconds > 0 or source.max_seconds is not None:
        _limit_lengths(utterances, cache)
    if len(utterances) == 0:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in utterances.dropped.items())
        raise SourceError(f"no utterance of split {source.split!r} of {table.origin} is left: {reasons}")
    if utterances.dropped:
        logger.warning("%s", utterances.summary())
    return utterances


def _limit_lengths(utterances: Utterances, cache: str | Path | None) -> None:
    source = utterances.source
    durations = utterances.durations(cache)
    utterances._drop(
        f"shorter than min_seconds = {source.min_seconds:g}", (durations > 0) & (durations < source.min_seconds)
    )
    if source.max_seconds is not None:
        longer = utterances.durations() > source.max_seconds
        utterances._drop(f"longer than max_seconds = {source.max_seconds:g}", longer)


def _with_undecoded_audio(table: Table, column: str) -> Table:
    """The table with audio as paths or encoded bytes; ``datasets`` would decode it with another library.

    Raises:
        SourceError: when the column holds neither.
    """
    feature = table.dataset.features[column]
    if _is_text(feature):
        return table
    from datasets import Audio, Value

    if isinstance(feature, Audio):
        return dataclasses.replace(table, dataset=table.dataset.cast_column(column, Audio(decode=False)))
    if isinstance(feature, dict) and {"bytes", "path", "shard"} & set(feature):
        return table
    if isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"):
        return table
    raise SourceError(f"column {column!r} of {table.origin} holds {_type_name(feature)}, not paths or audio files")


def _is_text(feature: Any) -> bool:
    """Whether a column holds strings, those of ``datasets`` or of a CSV file."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _type_name(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _texts(source: DataSource, table: Table, column: str) -> list[str]:
    values = table.values(column)
    wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if wrong is not None:
        raise SourceError(
            f"column {column!r} of {table.origin} holds {type(wrong).__name__} values such as {wrong!r}, not text"
        )
    return [normalized(value or "", source) for value in values]


def normalized(text: str, source: DataSource) -> str:
    """A transcript in the letter case and with the punctuation that ``source`` asks for, its accents composed (Unicode
    NFC) as they are in vocabularies."""
    if source.case == "keep" and source.punctuation == "keep":
        return " ".join(unicodedata.normalize("NFC", text).split())
    from speech_flax.text.normalization import normalize_transcript

    return normalize_transcript(
        text, case=source.case, punctuation=source.punctuation, keep_characters=source.keep_characters
    )


def _labels(table: Table, column: str) -> list[str]:
    """Values of a column in writing; numbers that stand for names are given the names."""
    from datasets import ClassLabel

    feature = table.dataset.features[column]
    values = table.values(column)
    if isinstance(feature, ClassLabel):
        return ["" if value is None or value < 0 else feature.int2str(value) for value in values]
    return ["" if value is None else value.strip() if isinstance(value, str) else json.dumps(value) for value in values]


def _ids(source: DataSource, table: Table, audio_column: str) -> list[str]:
    """Names of the rows: the id column, names of samples of tar shards or audio paths if they are all different, or
    split and row number."""
    if source.id_column is not None:
        column = table.column(source.id_column, (), "id_column")
        return [str(value) for value in table.values(column)]
    flat = dataclasses.replace(table, dataset=table.dataset.select_columns([audio_column]).flatten())
    if "__key__" in table.dataset.column_names and len(set(keys := table.values("__key__"))) == len(keys):
        return keys
    for column in (audio_column, f"{audio_column}.path"):
        if column in flat.dataset.column_names and flat.dataset.features[column].dtype.endswith("string"):
            names = flat.values(column)
            if all(names) and len(set(names)) == len(names):
                return names
    return [f"{source.split}-{row:07d}" for row in table.rows]


def _listed_durations(source: DataSource, table: Table) -> Float64[np.ndarray, "utterances"]:
    column = table.column(source.duration_column, (), "duration_column")
    values = table.values(column)
    try:
        durations = np.array([float(value) for value in values], np.float64)
    except (TypeError, ValueError) as error:
        raise SourceError(f"column {column!r} of {table.origin} does not hold seconds: {error}") from error
    if not (np.isfinite(durations).all() and (durations > 0).all()):
        row = int(np.flatnonzero(~(np.isfinite(durations) & (durations > 0)))[0])
        raise SourceError(f"column {column!r} of {table.origin} holds {values[row]!r} in row {row + 1}, not seconds")
    if np.median(durations) > 600:
        raise SourceError(
            f"column {column!r} of {table.origin} has a median of {np.median(durations):g}, which cannot be seconds; "
            "give a column with seconds, or none to read the audio headers"
        )
    return durations
