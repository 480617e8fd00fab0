"""Tar shards as WebDataset writes them: read in place, by random access, without unpacking or copying."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

#: Members with these endings are audio; ``.txt`` is the transcript, the keys of ``.json`` are further columns.
AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "sph")
#: Columns that say where a sample lies. Keys of ``.json`` with these names, such as an original path, are left out.
RESERVED_COLUMNS = ("__key__", "audio")


class ShardError(ValueError):
    """A shard that cannot be read, in one sentence."""


def read_shards(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Columns of all samples of the shards, in order.

    Members that share a name up to the first dot of its last part are one sample. The column ``audio`` says where its
    audio lies: ``{"shard", "offset", "size"}``, in bytes. ``__key__`` names the sample; ``text`` is there if any sample
    has a ``.txt``. Only tar headers and the texts are read.

    Raises:
        ShardError: for a file that is no uncompressed tar, or a sample without audio.
    """
    progress = tqdm(paths, desc="index of tar shards", unit="shard", delay=2, disable=None, leave=False)
    samples = [sample for path in progress for sample in read_samples(path)]
    names = {name: None for sample in samples for name in sample}
    return {name: [sample.get(name) for sample in samples] for name in names}


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of one shard, in order, as rows of the columns of :func:`read_shards`.

    Raises:
        ShardError: for a file that is no uncompressed tar, or a sample without audio.
    """
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                directory, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{directory}/{stem}" if directory else stem
                if sample and key != sample["__key__"]:
                    yield _checked(sample, path)
                    sample = {}
                sample |= {"__key__": key} | _column(archive, member, suffix.lower(), path)
    except (tarfile.TarError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path} cannot be read as a tar shard: {error}") from error
    if sample:
        yield _checked(sample, path)


def _column(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, path: Path) -> dict[str, Any]:
    """What one member adds to its sample."""
    if suffix in AUDIO_SUFFIXES:
        return {"audio": {"shard": str(path), "offset": member.offset_data, "size": member.size}}
    if suffix not in ("txt", "json"):
        return {}
    text = archive.extractfile(member).read().decode("utf-8")
    if suffix == "txt":
        return {"text": text}
    fields = json.loads(text)
    if not isinstance(fields, dict):
        return {}
    return {name: value for name, value in fields.items() if name not in RESERVED_COLUMNS}


def _checked(sample: dict[str, Any], path: Path) -> dict[str, Any]:
    if "audio" not in sample:
        raise ShardError(f"{path}: sample {sample['__key__']!r} has no audio file ({', '.join(AUDIO_SUFFIXES)})")
    return sample


def read_slice(shard: str, offset: int, size: int) -> bytes:
    """Bytes of one member."""
    with Path(shard).open("rb") as file:
        file.seek(offset)
        return file.read(size)
