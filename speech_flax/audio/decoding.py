"""Audio files to mono waveforms at one sampling rate."""

import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

#: Sampling rates outside of these (Hz) are taken for damage.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
#: Frames that a damaged header may promise without any file to hold them.
_UNKNOWN_LENGTH = 2**40


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
    import soundfile

    name = _name(source, name)
    try:
        with _open(source, name) as file:
            rate, promised = _checked_rate(file, name), file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: cannot be decoded: {_cause(source, error.error_string)}") from error
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
    """Seconds of audio that a file's header promises.

    Raises:
        AudioError: when the header cannot be read or promises nothing.
    """
    import soundfile

    name = _name(source, name)
    try:
        with _open(source, name) as file:
            rate, frames = _checked_rate(file, name), file.frames
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: cannot be decoded: {_cause(source, error.error_string)}") from error
    if not 0 < frames < _UNKNOWN_LENGTH:
        raise AudioError(f"{name}: holds no audio")
    return frames / rate


def _name(source: str | Path | bytes, name: str | None) -> str:
    return name or ("audio in memory" if isinstance(source, bytes) else str(source))


def _open(source: str | Path | bytes, name: str):
    """An open sound file, after the checks that give a clearer message than the decoder's."""
    import soundfile

    if isinstance(source, bytes):
        if not source:
            raise AudioError(f"{name}: is empty")
        return soundfile.SoundFile(io.BytesIO(source))
    path = Path(source)
    if not str(source) or not path.exists():
        raise AudioError(f"{name}: no such file" if str(source) else "an utterance has no audio file")
    if path.is_dir():
        raise AudioError(f"{name}: is a directory, not an audio file")
    if path.stat().st_size == 0:
        raise AudioError(f"{name}: is empty")
    return soundfile.SoundFile(str(path))


def _cause(source: str | Path | bytes, message: str) -> str:
    """The decoder's message, made clearer where it can be."""
    if _header_bytes(source).startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run git lfs pull"
    if message.startswith("Format not recognised"):
        return "its format is not known (WAV, FLAC, MP3, Ogg, Opus, AIFF and SPHERE are); convert it"
    return message.rstrip(".")


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
            return size // block if block and size < 0x7FFFFF00 else None
        at += 8 + size + size % 2
    return None
