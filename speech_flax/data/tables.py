"""Tables of utterances as they are found: a path or hub id to one Arrow table with a row per utterance."""

import csv
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from speech_flax.storage import in_bucket, storage_path

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
#: What the names of files end with, and those of data sets on the hub do not.
FILE_SUFFIXES = (*MANIFEST_SUFFIXES, ".parquet", ".arrow", ".tar", ".gz", ".zip", ".txt")
SPLIT_COLUMN = "split"
WHOLE = "train"


class SourceError(ValueError):
    """A data source that cannot be read, in one sentence that says what to change."""


@dataclasses.dataclass(frozen=True)
class Text:
    """The feature of a column of strings, as ``datasets.Value("string")``."""

    dtype: str = "string"


class TextDataset:
    """Columns of strings in memory: what :class:`Table` asks of a ``datasets.Dataset``, which takes long to import."""

    def __init__(self, columns: dict[str, list[str]]):
        self._columns = columns
        self.column_names = list(columns)
        self.features = dict.fromkeys(columns, Text())

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __getitem__(self, key: str | int) -> Any:
        """A column by its name, a row by its number."""
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def select_columns(self, names: Sequence[str]) -> "TextDataset":
        """Some of the columns, not copied."""
        return TextDataset({name: self._columns[name] for name in names})

    def flatten(self) -> "TextDataset":
        """The same: no column has parts."""
        return self


@dataclasses.dataclass(frozen=True)
class Table:
    """Some ``rows`` of a ``datasets.Dataset`` or :class:`TextDataset`, which is never copied; relative audio paths
    start from ``directory``; ``origin`` names the table in messages."""

    dataset: Any
    rows: Int64[np.ndarray, "rows"]
    directory: Path
    origin: str

    @classmethod
    def whole(cls, dataset: Any, directory: Path, origin: str) -> "Table":
        """All rows of ``dataset``."""
        return cls(dataset, np.arange(len(dataset)), directory, origin)

    def values(self, column: str) -> list[Any]:
        """One column of the rows."""
        values = self.dataset[column][:]
        return values if self.rows.size == len(values) else [values[row] for row in self.rows]

    def column(self, wanted: str | None, known: Sequence[str], field: str) -> str:
        """The name of a column: ``wanted``, or the first of ``known`` that exists.

        Raises:
            SourceError: when there is none, with the columns that exist and the nearest one.
        """
        return choose_column(self.dataset.column_names, wanted, known, field, self.origin)


def choose_column(names: Sequence[str], wanted: str | None, known: Sequence[str], field: str, origin: str) -> str:
    """One of ``names``: ``wanted``, or the first of ``known`` that is among them.

    Raises:
        SourceError: when there is none, with the columns of ``origin`` that exist and the nearest one.
    """
    for name in (wanted,) if wanted is not None else known:
        if name in names:
            return name
    sought = repr(wanted) if wanted is not None else " or ".join(repr(name) for name in known)
    nearest = difflib.get_close_matches(wanted or known[0], names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; set {field} to one of them"
    raise SourceError(f"{origin} has no column {sought} but {', '.join(map(repr, names))}{hint}")


def read_table(path: str, split: str, name: str | None = None) -> Table:
    """The rows of ``split`` in a manifest, a directory here or in a bucket, or a data set on the Hugging Face hub.

    A manifest is a CSV, TSV or JSON Lines file. Its rows, like those of a single Parquet, Arrow or tar file, belong to
    the split that their column ``split`` names, or, without such a column, to ``train``. A directory is searched for,
    in this order: ``<split>/metadata.*``, ``<split>.*`` and ``metadata.*`` with a manifest's suffix; a data set written
    by ``Dataset.save_to_disk``; data files that ``datasets`` recognises by their names, such as
    ``data/train-00000-of-00004.parquet``; tar shards, ``<split>*.tar`` or ``<split>/*.tar``, as WebDataset writes them.
    ``name`` is the configuration of a hub data set (a language, often).

    Raises:
        SourceError: when nothing is found, a file is malformed, or the split does not exist or is empty.
    """
    local = Path(path).expanduser()
    if local.is_file():
        table = _read_file(local, split)
    elif local.is_dir():
        table = _read_directory(local, split, name)
    elif in_bucket(path):
        table = Table.whole(load_bucket(path, split), Path(), path)
    elif may_be_hub_id(path):
        table = Table.whole(load_dataset(path, split, name), Path(), f"data set {path!r}")
    else:
        raise SourceError(f"data source {path!r} is neither a file nor a directory")
    if table.rows.size == 0:
        raise SourceError(f"split {split!r} of {table.origin} has no rows")
    return table


def may_be_hub_id(path: str) -> bool:
    """Whether ``path``, which is no local one, has the form OWNER/NAME of the hub."""
    parts = path.split("/")
    file = Path(path).suffix.lower() in FILE_SUFFIXES
    return len(parts) == 2 and all(part and part.strip(".~") for part in parts) and not file


def _read_file(path: Path, split: str) -> Table:
    if path.suffix in MANIFEST_SUFFIXES:
        return _of_split(_read_manifest(path), split)
    if path.suffix == ".parquet":
        dataset = load_dataset("parquet", WHOLE, data_files=str(path), origin=str(path))
    elif path.suffix == ".arrow":
        dataset = load_dataset("arrow", WHOLE, data_files=str(path), origin=str(path))
    elif path.suffix == ".tar":
        return _of_split(_read_tar([path], path.parent, str(path)), split)
    else:
        raise SourceError(f"{path} is no manifest: expected {', '.join(MANIFEST_SUFFIXES)}, .parquet, .arrow or .tar")
    return _of_split(Table.whole(dataset, path.parent, str(path)), split)


def _read_directory(directory: Path, split: str, name: str | None) -> Table:
    for stem in (f"{split}/metadata", split):
        for suffix in MANIFEST_SUFFIXES:
            if (manifest := directory / f"{stem}{suffix}").is_file():
                return _read_manifest(manifest)
    for suffix in MANIFEST_SUFFIXES:
        if (manifest := directory / f"metadata{suffix}").is_file():
            return _of_split(_read_manifest(manifest), split)
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        return _read_saved(directory, split)
    if shards := tar_paths(directory, split):
        return _read_tar(shards, directory, str(directory))
    return Table.whole(load_dataset(str(directory), split, name), directory, str(directory))


def tar_paths(directory: Path, split: str) -> list[Path]:
    """Tar shards of a split in a directory, in order."""
    return sorted(directory.glob(f"{split}*.tar")) or sorted(directory.glob(f"{split}/*.tar"))


def _read_tar(shards: Sequence[Path], directory: Path, origin: str) -> Table:
    from speech_flax.data.tar_shards import ShardError, read_shards

    try:
        columns = read_shards(shards)
    except ShardError as error:
        raise SourceError(str(error)) from error
    return table_of_columns(columns, directory, origin)


def _read_saved(directory: Path, split: str) -> Table:
    import datasets

    if (directory / "state.json").is_file():
        return _of_split(Table.whole(datasets.load_from_disk(str(directory)), directory, str(directory)), split)
    saved = datasets.load_from_disk(str(directory))
    if split not in saved:
        raise SourceError(_no_split(str(directory), split, saved))
    return Table.whole(saved[split], directory, str(directory))


def _no_split(origin: str, split: str, known: Iterable[str]) -> str:
    return f"{origin} has no split {split!r} but {', '.join(sorted(map(repr, known)))}"


def _of_split(table: Table, split: str) -> Table:
    """The rows of a table whose column ``split``, if it has one, says so."""
    if SPLIT_COLUMN in table.dataset.column_names:
        values = np.array(table.values(SPLIT_COLUMN), object)
        rows = table.rows[values == split]
        if rows.size == 0:
            raise SourceError(_no_split(table.origin, split, {str(value) for value in values}))
        return dataclasses.replace(table, rows=rows)
    require_whole(split, table.origin)
    return table


def require_whole(split: str, origin: str) -> None:
    """Refuse every split but ``train`` of a file without a column ``split``.

    Raises:
        SourceError: for another split.
    """
    if split != WHOLE:
        raise SourceError(
            f"{origin} has no split {split!r}: it has no column {SPLIT_COLUMN!r}, so all its rows are {WHOLE!r}"
        )


def _read_manifest(path: Path) -> Table:
    try:
        if path.suffix in (".json", ".jsonl"):
            return table_of_columns(_read_json(path), path.parent, str(path))
        return Table.whole(TextDataset(_read_csv(path)), path.parent, str(path))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error


def table_of_columns(columns: dict[str, list[Any]], directory: Path, origin: str) -> Table:
    """A table held in memory.

    Raises:
        SourceError: when a column mixes types of values.
    """
    import datasets

    try:
        return Table.whole(datasets.Dataset.from_dict(columns), directory, origin)
    except Exception as error:  # Arrow raises several unrelated types for values of different types in one column
        raise SourceError(f"{origin} mixes types of values in one column: {first_line(error)}") from error


def _read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV or TSV file with a header. Every value stays text: no "null" or "1e5" is taken for a number."""
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **tabs)
        try:
            header = next(reader, None)
            if not header:
                raise SourceError(f"{path} is empty; its first line must name the columns")
            for row in reader:
                if len(row) == len(header):
                    rows.append(row)
                elif row:
                    raise SourceError(
                        f"{path}, line {reader.line_num}, has {len(row)} fields, but the header has {len(header)}; "
                        "quote values that hold the separator"
                    )
        except csv.Error as error:
            raise SourceError(f"{path}, line {reader.line_num}: {error}") from error
    if len(set(header)) < len(header):
        raise SourceError(f"{path} names a column twice: {', '.join(header)}")
    return {name: list(values) for name, values in zip(header, zip(*rows, strict=True), strict=True)} if rows else {}


def _read_json(path: Path) -> dict[str, list[Any]]:
    """Columns of a file with one JSON object per line, or one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        records = _parse_json(text, path, 1)
    else:
        lines = enumerate(text.split("\n"), 1)
        records = [_parse_json(line, path, number) for number, line in lines if line.strip()]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise SourceError(f"{path}: record {number} is no JSON object but {str(record)[:40]!r}")
    names = {name: None for record in records for name in record}
    return {name: [record.get(name) for record in records] for name in names}


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}, line {first_line + error.lineno - 1}, is not JSON: {error.msg}") from error


def load_dataset(path: str, split: str, name: str | None = None, origin: str | None = None, **options: Any) -> Any:
    """``datasets.load_dataset`` with one-sentence errors, and progress bars on a terminal only."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    origin = origin or f"data set {path!r}"
    try:
        return datasets.load_dataset(path, name, split=split, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, ImportError) as error:
        cause = error.__cause__ or error
        raise SourceError(f"cannot read split {split!r} of {origin}: {first_line(cause)}") from error


def load_bucket(path: str, split: str, **options: Any) -> Any:
    """The data set in the Parquet files of a split in a bucket: ``train*.parquet``, ``data/train*.parquet`` or
    ``train/*.parquet`` there, or the one file that ``path`` names.

    Raises:
        SourceError: when there are none, or they cannot be read.
    """
    if path.endswith(".parquet"):
        return load_dataset("parquet", WHOLE, data_files=path, origin=path, **options)
    directory = storage_path(path)
    for pattern in (f"{split}*.parquet", f"data/{split}*.parquet", f"{split}/*.parquet"):
        if files := sorted(str(file) for file in directory.glob(pattern)):
            return load_dataset("parquet", WHOLE, data_files=files, origin=path, **options)
    raise SourceError(f"there are no Parquet files {split}*.parquet in {path}; other formats are not read from buckets")


def first_line(error: BaseException) -> str:
    """The message of an error in one line; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
