"""Files of every format become the same waveform; files that are broken are refused with file and cause."""

import io
import struct

import numpy as np
import pytest
import soundfile

from speech_flax.audio.decoding import AudioError, audio_duration, load_audio, resample

SECONDS = 1.0


def tone(rate, hertz=440.0):
    """A tone that fades in and out, so that resampling and codecs have no edges to trip over."""
    time = np.arange(int(SECONDS * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / SECONDS) ** 2


def encoded(rate=16_000, channels=1, samples=None, **options):
    """The bytes of a file that soundfile writes."""
    samples = tone(rate) if samples is None else samples
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([samples] * channels, axis=-1), rate, **options)
    return buffer.getvalue()


def sphere(samples, rate=16_000, sample_count=None):
    """A NIST SPHERE file: a header of 1024 bytes in text, then 16-bit samples."""
    fields = {
        "sample_count": f"-i {len(samples) if sample_count is None else sample_count}",
        "sample_rate": f"-i {rate}",
        "channel_count": "-i 1",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": "-s2 01",
        "sample_coding": "-s3 pcm",
    }
    header = "NIST_1A\n   1024\n" + "".join(f"{name} {value}\n" for name, value in fields.items()) + "end_head\n"
    return header.encode().ljust(1024) + (samples * 32767).astype("<i2").tobytes()


#: Format, options, and how far its samples may be from the original.
FORMATS = [
    ({"format": "WAV", "subtype": "PCM_U8"}, 1e-2),
    ({"format": "WAV", "subtype": "PCM_16"}, 1e-4),
    ({"format": "WAV", "subtype": "PCM_24"}, 1e-4),
    ({"format": "WAV", "subtype": "PCM_32"}, 1e-4),
    ({"format": "WAV", "subtype": "FLOAT"}, 1e-4),
    ({"format": "WAV", "subtype": "DOUBLE"}, 1e-4),
    ({"format": "WAV", "subtype": "ULAW"}, 3e-2),
    ({"format": "WAV", "subtype": "ALAW"}, 3e-2),
    ({"format": "FLAC", "subtype": "PCM_16"}, 1e-4),
    ({"format": "FLAC", "subtype": "PCM_24"}, 1e-4),
    ({"format": "AIFF", "subtype": "PCM_16"}, 1e-4),
    ({"format": "AIFF", "subtype": "PCM_24"}, 1e-4),
    ({"format": "MP3"}, 2e-2),
    ({"format": "OGG", "subtype": "VORBIS"}, 5e-2),
    ({"format": "OGG", "subtype": "OPUS"}, 5e-2),
]


@pytest.mark.parametrize(("options", "tolerance"), FORMATS, ids=["-".join(one.values()) for one, _ in FORMATS])
def test_every_format_gives_the_waveform(tmp_path, options, tolerance):
    content = encoded(channels=2, **options)
    path = tmp_path / "tone.audio"
    path.write_bytes(content)
    waveform = load_audio(path)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 16_000) <= 2400  # MP3 pads by its frames
    np.testing.assert_allclose(waveform[:16_000], tone(16_000)[: len(waveform)], atol=tolerance)
    np.testing.assert_array_equal(load_audio(content), waveform)
    assert audio_duration(path) == pytest.approx(len(waveform) / 16_000)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_every_rate_is_resampled(rate):
    waveform = load_audio(encoded(rate, format="WAV", subtype="FLOAT"))
    assert len(waveform) == 16_000
    np.testing.assert_allclose(waveform, tone(16_000), atol=1e-3)


def test_sphere_files_are_read():
    np.testing.assert_allclose(load_audio(sphere(tone(16_000))), tone(16_000), atol=1e-4)
    np.testing.assert_allclose(load_audio(sphere(tone(8000), 8000)), tone(16_000), atol=1e-3)


def test_channels_are_averaged_and_other_rates_kept_when_asked_for():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone(8000), np.zeros(8000)], axis=-1), 8000, format="WAV", subtype="FLOAT")
    np.testing.assert_allclose(load_audio(buffer.getvalue(), sampling_rate=8000), tone(8000) / 2, atol=1e-6)
    untouched = tone(8000).astype(np.float32)
    np.testing.assert_array_equal(resample(untouched, 8000, 8000), untouched)


WAV = encoded(format="WAV", subtype="PCM_16")


def with_rate(rate):
    return WAV[:24] + struct.pack("<I", rate) + WAV[28:]


BROKEN = {
    "empty": (b"", "is empty"),
    "noise": (bytes(range(256)) * 8, "format is not known"),
    "text": (b"HELLO WORLD " * 50, "format is not known"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "header alone": (WAV[:44], "holds no audio|truncated"),
    "half a header": (WAV[:20], "cannot be decoded"),
    "no samples": (encoded(samples=np.zeros(0), format="WAV"), "holds no audio"),
    "truncated WAV": (WAV[:20_000], "truncated: .* of 16000 samples"),
    "truncated AIFF": (encoded(format="AIFF")[:20_000], "truncated: .* of 16000 samples"),
    "truncated FLAC": (encoded(format="FLAC")[:5000], "truncated|cannot be decoded"),
    "truncated SPHERE": (sphere(tone(16_000))[:20_000], "truncated: .* of 16000 samples"),
    "rate of 0 Hz": (with_rate(0), "cannot be"),
    "rate of 1 Hz": (with_rate(1), "1 samples per second, which cannot be"),
    "rate of 2 GHz": (with_rate(2_000_000_000), "samples per second, which cannot be|cannot be decoded"),
    "no number": (encoded(samples=np.array([0, np.nan, 1] * 400), format="WAV", subtype="FLOAT"), "no finite numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_file_and_cause(tmp_path, case):
    content, cause = BROKEN[case]
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"broken\.wav: .*({cause})") as raised:
        load_audio(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(AudioError, match=rf"utterance 7: .*({cause})"):
        load_audio(content, name="utterance 7")


def test_what_is_no_file_is_refused(tmp_path):
    for read in (load_audio, audio_duration):
        with pytest.raises(AudioError, match=r"missing\.wav: no such file"):
            read(tmp_path / "missing.wav")
        with pytest.raises(AudioError, match="is a directory"):
            read(tmp_path)
        with pytest.raises(AudioError, match="has no audio file"):
            read("")
        with pytest.raises(AudioError, match="audio in memory: is empty"):
            read(b"")
