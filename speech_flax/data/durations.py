"""Durations of audio files from their headers, in parallel and remembered between runs."""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from speech_flax.audio.decoding import AudioError, audio_duration

logger = logging.getLogger(__name__)

Audio = str | bytes
NUM_THREADS = 16


def scan_durations(
    audio: Callable[[int], Audio], identities: Sequence[str], *, cache: Path | None = None, description: str = "audio"
) -> Float64[np.ndarray, "utterances"]:
    """Durations in seconds of ``audio(0)``, ``audio(1)``, ...; 0 where the header cannot be read.

    Args:
        audio: Path or encoded bytes of an utterance.
        identities: One text per utterance that changes when its audio does; see :func:`file_identity`. Empty: unknown,
            read anew in every run.
        cache: File in which durations are kept by identity; written when any was missing from it. An interrupted scan
            keeps what it has read.
        description: What the progress bar says.
    """
    keys = np.array([_key(identity) for identity in identities], np.uint64)
    known = _read_cache(cache)
    durations = np.array([known.get(int(key), -1.0) for key in keys], np.float64)
    missing = np.flatnonzero((durations < 0) | (keys == 0))
    if missing.size == 0:
        return durations
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="durations")
    try:
        found = pool.map(lambda row: _duration(audio, row), missing.tolist())
        progress = tqdm(found, total=missing.size, desc=f"lengths of {description}", delay=2, disable=None, leave=False)
        for row, seconds in zip(missing, progress, strict=True):
            durations[row] = seconds
    finally:
        pool.shutdown(cancel_futures=True)
        if cache is not None:
            readable = (durations > 0) & (keys != 0)
            known.update(zip(keys[readable].tolist(), durations[readable].tolist(), strict=True))
            _write_cache(cache, known)
    return durations


def file_identity(path: str | Path) -> str:
    """A text that changes when the file does: path, size and time of change; empty when there is no such file."""
    try:
        status = Path(path).stat()
    except OSError:
        return ""
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"


def _duration(audio: Callable[[int], Audio], row: int) -> float:
    try:
        return audio_duration(audio(row))
    except (AudioError, OSError) as error:
        logger.debug("no duration: %s", error)
        return 0.0


def _key(identity: str) -> int:
    """64-bit hash; 0 stands for no identity."""
    if not identity:
        return 0
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little") or 1


def _read_cache(path: Path | None) -> dict[int, float]:
    if path is None or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(zip(arrays["keys"].tolist(), arrays["seconds"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); durations are read again", path, error)
        return {}


def _write_cache(path: Path, known: dict[int, float]) -> None:
    """Replaces the file in one step, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = np.fromiter(known.keys(), np.uint64, len(known))
    seconds = np.fromiter(known.values(), np.float64, len(known))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, keys=keys, seconds=seconds)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
