"""Shards of a data set, read one after the other: for data that are too many to index, or not on this machine."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from speech_flax.data.tables import (
    SPLIT_COLUMN,
    WHOLE,
    SourceError,
    Table,
    first_line,
    load_bucket,
    load_dataset,
    may_be_hub_id,
    require_whole,
    table_of_columns,
    tar_paths,
)
from speech_flax.data.tar_shards import ShardError, read_samples
from speech_flax.storage import in_bucket

#: Files that one shard is read from, and the builder of ``datasets`` that reads them.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


@runtime_checkable
class Shards(Protocol):
    """Rows in shards. Reading begins at any row of any shard.

    ``columns`` are their names; relative audio paths start from ``directory``; ``origin`` names the data in messages;
    ``identity`` changes when the shards do, as far as it can be known without reading them.
    """

    columns: Sequence[str]
    directory: Path
    origin: str
    identity: str

    def __len__(self) -> int:
        """Number of shards."""

    def rows(self, shard: int, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of one shard from the row ``first`` on, with their numbers."""


class TarShards:
    """Tar files as WebDataset writes them. A row says where its audio lies; the bytes are read when they are needed. Of
    rows that are skipped, the headers are read."""

    def __init__(self, paths: Sequence[Path], directory: Path, origin: str, split: str | None = None):
        self._paths = list(paths)
        self.directory = directory
        self.origin = origin
        self.identity = "\n".join(f"{path.name}|{path.stat().st_size}" for path in self._paths)
        self.columns = list(next(iter(read_samples(self._paths[0])), {}))
        self._split = split if SPLIT_COLUMN in self.columns else None

    def __len__(self) -> int:
        return len(self._paths)

    def rows(self, shard: int, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, sample in itertools.islice(enumerate(read_samples(self._paths[shard])), first, None):
            if self._split is None or sample.get(SPLIT_COLUMN) == self._split:
                yield number, sample


class DatasetShards:
    """What ``datasets`` streams: Parquet, Arrow, JSON or tar files on the hub or in a directory. Rows that are skipped
    are read, and not converted; other shards are not touched."""

    def __init__(self, dataset: Any, directory: Path, origin: str, split: str | None = None):
        from datasets import Audio

        features = dataset.features or {}
        for name, feature in features.items():
            if isinstance(feature, Audio):
                dataset = dataset.cast_column(name, Audio(decode=False))
        self._dataset = dataset
        self.directory = directory
        self.origin = origin
        self.identity = ""
        self.columns = list(features or next(iter(dataset), {}))
        self._split = split if SPLIT_COLUMN in self.columns else None

    def __len__(self) -> int:
        return self._dataset.num_shards

    def rows(self, shard: int, first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = self._dataset.shard(num_shards=len(self), index=shard)
        try:
            for number, record in enumerate(rows.skip(first) if first else rows, first):
                if self._split is None or record[SPLIT_COLUMN] == self._split:
                    yield number, record
        except Exception as error:  # whatever the readers of files and the network raise for what is damaged or gone
            raise SourceError(f"shard {shard} of {self.origin} cannot be read: {first_line(error)}") from error


def open_shards(path: str, split: str, name: str | None = None) -> Shards:
    """The shards of ``split`` in a directory, a bucket, a single file or a data set on the Hugging Face hub.

    A directory holds tar shards, ``<split>*.tar`` or ``<split>/*.tar``, or files that ``datasets`` recognises by their
    names, such as ``data/train-00000-of-00004.parquet`` or ``train-0.jsonl``. Of a single Parquet, Arrow, JSON Lines or
    tar file, the rows whose column ``split`` says so are read; without such a column, all of them are ``train``.

    Raises:
        SourceError: when nothing is found, the split does not exist, or shards cannot be read.
    """
    local = Path(path).expanduser()
    try:
        if local.is_file():
            shards = _open_file(local, split)
        elif local.is_dir() and (paths := tar_paths(local, split)):
            shards = TarShards(paths, local, str(local))
        elif local.is_dir():
            dataset = load_dataset(str(local), split, name, streaming=True)
            shards = DatasetShards(dataset, local, str(local))
        elif in_bucket(path):
            shards = DatasetShards(load_bucket(path, split, streaming=True), Path(), path)
        elif may_be_hub_id(path):
            dataset = load_dataset(path, split, name, streaming=True)
            shards = DatasetShards(dataset, Path(), f"data set {path!r}")
        else:
            raise SourceError(f"data source {path!r} is neither a file nor a directory")
    except ShardError as error:
        raise SourceError(str(error)) from error
    if not shards.columns:
        raise SourceError(f"split {split!r} of {shards.origin} has no rows")
    return shards


def first_rows(path: str, split: str, name: str | None, limit: int) -> Table:
    """The first ``limit`` rows of a stream, held in memory.

    Raises:
        SourceError: as :func:`open_shards`.
    """
    shards = open_shards(path, split, name)
    rows = (record for shard in range(len(shards)) for _, record in shards.rows(shard))
    records = list(itertools.islice(rows, limit))
    columns = {column: [record.get(column) for record in records] for column in shards.columns}
    return table_of_columns(columns, shards.directory, shards.origin)


def _open_file(path: Path, split: str) -> Shards:
    if path.suffix == ".tar":
        shards = TarShards([path], path.parent, str(path), split)
    elif path.suffix in _BUILDERS:
        dataset = load_dataset(_BUILDERS[path.suffix], WHOLE, data_files=str(path), origin=str(path), streaming=True)
        shards = DatasetShards(dataset, path.parent, str(path), split)
    else:
        raise SourceError(
            f"{path} cannot be streamed: expected a directory of shards, {', '.join(_BUILDERS)} or .tar; leave out "
            "streaming, since a table of paths is small"
        )
    if SPLIT_COLUMN not in shards.columns:
        require_whole(split, str(path))
    return shards
