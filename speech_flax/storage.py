"""Directories of this machine and directories in buckets (``gs://``): one kind of path, and copies between them."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

#: What has the methods of :class:`pathlib.Path`, here or in a bucket.
AnyPath = Path | epath.Path
_SCHEME = "gs://"
_PIECE = 16 * 2**20


class StorageError(OSError):
    """A bucket that cannot be used, in one sentence."""


def in_bucket(name: str | os.PathLike) -> bool:
    """Whether a name is of Google Cloud Storage rather than of this machine."""
    return os.fspath(name).startswith(_SCHEME)


def storage_path(name: str | os.PathLike) -> AnyPath:
    """The path that ``name`` stands for, on this machine or, with ``gs://`` before it, in a bucket.

    Raises:
        StorageError: for a bucket, when the package that reads and writes them is not installed.
    """
    if not in_bucket(name):
        return Path(name)
    if importlib.util.find_spec("gcsfs") is None:
        raise StorageError(f"{name} is in a bucket, which needs the package gcsfs: pip install 'speech_flax[gcs]'")
    return epath.Path(name)


def exists(path: AnyPath) -> bool:
    """Whether there is such a file or directory.

    Raises:
        StorageError: when the bucket cannot be reached or may not be read.
    """
    try:
        return path.exists()
    except Exception as error:  # whatever the network, its libraries and the service raise
        if isinstance(path, Path):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise StorageError(
            f"{path} cannot be reached ({reason}); check the name of the bucket, and that this machine may use it"
        ) from error


@contextmanager
def written_locally(directory: AnyPath) -> Iterator[Path]:
    """A directory of this machine to write into: ``directory`` itself, or one whose files go there at the end."""
    if isinstance(directory, Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as aside:
        yield Path(aside)
        for file in sorted(Path(aside).rglob("*")):
            if file.is_file():
                target = directory / file.relative_to(aside).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, target)


def fetched(name: str) -> Path:
    """A copy on this machine of the files directly in a directory of a bucket, kept beside what comes from the hub.

    A copy is used again as long as names, sizes and times of the files are the same.

    Raises:
        FileNotFoundError: when there are no files under that name.
        StorageError: see :func:`exists`.
    """
    from huggingface_hub.constants import HF_HOME

    source = storage_path(name)
    files = sorted(file for file in source.iterdir() if file.is_file()) if exists(source) else []
    if not files:
        raise FileNotFoundError(f"there are no files in {name}")
    states = ((file, file.stat()) for file in files)
    listed = "\n".join(f"{file} {state.length} {state.mtime}" for file, state in states)
    target = Path(HF_HOME) / "speech_flax" / hashlib.blake2b(listed.encode(), digest_size=12).hexdigest()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as aside:
        for file in files:
            _copy(file, Path(aside) / file.name)
        try:
            Path(aside).rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def _copy(source: AnyPath, target: AnyPath) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, _PIECE)
