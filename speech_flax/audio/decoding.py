"""Audio files to mono waveforms at one sampling rate."""

import contextlib
import io
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from speech_flax.audio.mpeg import with_frame_count

#: Sampling rates outside of these (Hz) are taken for damage.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
#: Frames that no file holds; libsndfile gives more for files written to a pipe, whose headers do not know.
_UNKNOWN_LENGTH = 2**40
#: Bytes of audio in the header of a WAV file written to a pipe: at least these, a round number less at most a frame.
_PIPED_BYTES = 0x7FFFF000 - 65_536
#: Frames that are decoded at once where the length is not known.
_BLOCK = 2**18


class AudioError(ValueError):
    """An audio file that cannot be used; the message names the file and the cause."""


def load_audio(
    source: str | Path | bytes, *, sampling_rate: int = 16_000, name: str | None = None
) -> Float32[np.ndarray, "samples"]:
    """Decode a file to a mono waveform in [-1, 1].

    Args:
        source: Path, or the bytes of a file: WAV, FLAC, MP3, Ogg (Vorbis, Opus), AIFF, SPHERE and whatever else
            libsndfile knows.
        sampling_rate: Rate to resample to, in Hz.
        name: What messages call the file; its path by default.

    Returns:
        The mean of all channels, resampled (soxr, high quality).

    Raises:
        AudioError: when the file is missing, empty, truncated, without audio, or of an absurd rate.
    """
    name = _name(source, name)
    with _opened(source, name) as file:
        rate, promised = _checked_rate(file, name), file.frames
        samples = _read(file)
        if len(samples) == 0:
            raise AudioError(f"{name}: holds no audio")
        _check_complete(source, name, promised, len(samples))
    waveform = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: holds samples that are no finite numbers")
    return resample(waveform, rate, sampling_rate)


def resample(waveform: Float[np.ndarray, "samples"], rate: int, target_rate: int) -> Float32[np.ndarray, "resampled"]:
    """``waveform`` at ``target_rate`` instead of ``rate``, both in Hz."""
    if rate == target_rate:
        return np.ascontiguousarray(waveform, np.float32)
    import soxr

    return soxr.resample(waveform.astype(np.float32), rate, target_rate, quality="HQ")


def audio_duration(source: str | Path | bytes, name: str | None = None) -> float:
    """Seconds of audio that a file's header promises. Files whose header does not know are read to their end.

    Raises:
        AudioError: when the header cannot be read, or there is no audio.
    """
    name = _name(source, name)
    with _opened(source, name) as file:
        rate, frames = _checked_rate(file, name), file.frames
        if frames >= _UNKNOWN_LENGTH:
            frames = sum(len(block) for block in _blocks(file))
    if frames <= 0:
        raise AudioError(f"{name}: holds no audio")
    return frames / rate


def _name(source: str | Path | bytes, name: str | None) -> str:
    return name or ("audio in memory" if isinstance(source, bytes) else str(source))


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str) -> Iterator[Any]:
    """An open sound file. Whatever goes wrong with it, in the block too, is an :class:`AudioError`."""
    import soundfile

    try:
        with _open(source, name) as file:
            yield file
    except AudioError:
        raise
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: cannot be decoded: {_cause(source, error.error_string)}") from error
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        raise AudioError(f"{name}: cannot be decoded: {error}") from error


def _open(source: str | Path | bytes, name: str) -> Any:
    """An open sound file, after the checks that give a clearer message than the decoder's."""
    import soundfile

    if isinstance(source, bytes):
        if not source:
            raise AudioError(f"{name}: is empty")
        file = soundfile.SoundFile(io.BytesIO(source))
    else:
        if not str(source):
            raise AudioError("an utterance has no audio file")
        try:
            status = Path(source).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise AudioError(f"{name}: no such file") from None
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{name}: is a directory, not an audio file")
        if status.st_size == 0:
            raise AudioError(f"{name}: is empty")
        file = soundfile.SoundFile(str(source))
    if file.format == "MP3":  # libsndfile reads no further than it guesses the length to be
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream:
            counted = with_frame_count(stream)
        if counted is not None:
            file.close()
            return soundfile.SoundFile(io.BytesIO(counted))
    return file


def _read(file: Any) -> Float32[np.ndarray, "frames channels"]:
    """All samples of an open sound file."""
    if file.frames < _UNKNOWN_LENGTH:
        return file.read(dtype="float32", always_2d=True)
    return np.concatenate([np.empty((0, file.channels), np.float32), *_blocks(file)])


def _blocks(file: Any) -> Iterator[Float32[np.ndarray, "frames channels"]]:
    """The samples of an open sound file of unknown length, some at a time."""
    file.seekable = lambda: False  # soundfile would seek after every block, which fails behind the last one
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        yield block


def _cause(source: str | Path | bytes, message: str) -> str:
    """The decoder's message, made clearer where it can be."""
    if not message.startswith("Format not recognised"):
        return message.rstrip(".")
    if _header_bytes(source).startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run git lfs pull"
    return "its format is not known (WAV, FLAC, MP3, Ogg, Opus, AIFF and SPHERE are); convert it"


def _checked_rate(file, name: str) -> int:
    if not _LOWEST_RATE <= file.samplerate <= _HIGHEST_RATE:
        raise AudioError(f"{name}: says it has {file.samplerate} samples per second, which cannot be")
    return file.samplerate


def _check_complete(source: str | Path | bytes, name: str, promised: int, decoded: int) -> None:
    """Refuse files that end before their header says.

    Decoders return what there is. libsndfile corrects the length of truncated PCM files when it opens them; the length
    in the header itself tells.
    """
    if promised < _UNKNOWN_LENGTH:
        header = _header_bytes(source)
        promised = max(promised, _promised_frames(header) or 0)
        if decoded < promised - max(4608, math.ceil(0.01 * promised)):  # encoders pad by a few frames
            raise AudioError(f"{name}: is truncated: {decoded} of {promised} samples are there")


def _header_bytes(source: str | Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4096]
    with Path(source).open("rb") as file:
        return file.read(4096)


def _promised_frames(header: bytes) -> int | None:
    """Frames that the header of a WAV, AIFF or SPHERE file promises; ``None`` for other formats or streamed files."""
    if header[:4] == b"RIFF" and header[8:12] == b"WAVE":
        return _riff_frames(header, "little")
    if header[:4] == b"FORM" and header[8:12] in (b"AIFF", b"AIFC"):
        at = header.find(b"COMM")
        return int.from_bytes(header[at + 10 : at + 14], "big") if at > 0 else None
    if header[:7] == b"NIST_1A":
        for line in header[:1024].decode("latin-1").splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[0] == "sample_count":
                return int(fields[2]) if fields[2].isdigit() else None
    return None


def _riff_frames(header: bytes, order: str) -> int | None:
    at, block = 12, 0
    while at + 8 <= len(header):
        kind, size = header[at : at + 4], int.from_bytes(header[at + 4 : at + 8], order)
        if kind == b"fmt ":
            block = int.from_bytes(header[at + 20 : at + 22], order)
        if kind == b"data":
            return size // block if block and size < _PIPED_BYTES else None
        at += 8 + size + size % 2
    return None
