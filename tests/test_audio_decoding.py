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


def with_samples(number, samples=None):
    """A FLAC file whose header promises another number of samples."""
    content = bytearray(encoded(samples=samples, format="FLAC"))
    content[21] = content[21] & 0xF0 | number >> 32
    content[22:26] = (number & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


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


def frames_of_mp3(rate=16_000, channels=1, quiet_start=True):
    """An MP3 file of 3 s, a third of it silence, in frames of variable size and without the header that counts them."""
    noise = np.random.RandomState(0).randn(2 * rate) * np.linspace(0.3, 0.01, 2 * rate)
    parts = [np.zeros(rate), noise] if quiet_start else [noise, np.zeros(rate)]
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    content = encoded(rate, channels, np.concatenate(parts), **options)
    sync = content[:2]
    starts = [at for at in range(1, 2000) if content[at : at + 2] == sync]
    assert content.index(b"Xing") < starts[0]
    return content[starts[0] :]


@pytest.mark.parametrize("quiet_start", [True, False])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16_000, 2), (44_100, 1), (48_000, 2)])
def test_mp3_without_a_count_of_frames_is_read_to_its_end(tmp_path, rate, channels, quiet_start):
    content = frames_of_mp3(rate, channels, quiet_start)
    path = tmp_path / "frames.mp3"
    path.write_bytes(content)
    waveform = load_audio(path, sampling_rate=rate)
    assert 3 <= len(waveform) / rate <= 3 + 4 * 1152 / rate  # the encoder pads; nothing says by how much
    assert audio_duration(path) == len(waveform) / rate
    loud = np.abs(waveform).reshape(-1)[: 3 * rate].reshape(3, rate).max(axis=1) > 0.1
    np.testing.assert_array_equal(loud, [False, True, True] if quiet_start else [True, True, False])
    np.testing.assert_array_equal(load_audio(content, sampling_rate=rate), waveform)


def test_what_lies_around_the_frames_of_an_mp3_file_does_not_count(tmp_path):
    content = frames_of_mp3()
    expected = load_audio(content)
    picture = np.random.RandomState(1).bytes(20_000)
    tag = b"ID3\x04\0\0" + bytes((0, 1, 0x1C, 0x20)) + picture  # 20000 in units of seven bits
    for around in (tag + content, tag + tag + content, content + b"TAG" + bytes(125)):
        np.testing.assert_array_equal(load_audio(around), expected)
        assert audio_duration(around) == audio_duration(content)
    path = tmp_path / "cut.mp3"
    path.write_bytes(content[200:-1])  # begins and ends within a frame
    assert len(expected) - 4 * 1152 <= len(load_audio(path)) < len(expected)
    assert audio_duration(path) == len(load_audio(path)) / 16_000


@pytest.mark.parametrize("read_from", ["path", "bytes"])
def test_flac_of_unknown_length_is_read_to_its_end(tmp_path, read_from):
    """As encoders leave it that write to a pipe: the header says 0 samples."""
    samples = np.resize(tone(16_000), 300_000)
    content = with_samples(0, samples)
    path = tmp_path / "piped.flac"
    path.write_bytes(content)
    source = path if read_from == "path" else content
    np.testing.assert_allclose(load_audio(source), samples, atol=1e-4)
    assert audio_duration(source) == len(samples) / 16_000
    with pytest.raises(AudioError, match="cannot be decoded"):
        load_audio(content[:20_000])


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFF000 - 44, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_written_to_a_pipe_is_read_to_its_end(channels, size):
    """SoX writes 0x7ffff000 bytes, rounded down to whole frames; others the largest number, or the file's with its
    header."""
    content = encoded(channels=channels, format="WAV", subtype="PCM_16")
    at = content.index(b"data") + 4
    size -= size % (2 * channels)
    content = content[:at] + struct.pack("<I", size) + content[at + 4 :]
    np.testing.assert_allclose(load_audio(content), tone(16_000), atol=1e-4)
    assert audio_duration(content) == 1


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
    "FLAC of 68 thousand million samples": (with_samples(2**36 - 1), "truncated|cannot be decoded"),
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


def test_whatever_goes_wrong_with_one_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "secret.wav").write_bytes(WAV)
    for read in (load_audio, audio_duration):
        with pytest.raises(AudioError, match="cannot be decoded: embedded null byte"):
            read("a\0b.wav")
    for error in (PermissionError(13, "Permission denied"), MemoryError("no room")):
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, error=error, **__: raise_(error))
        with pytest.raises(AudioError, match=rf"secret\.wav: cannot be decoded: .*{error.args[-1]}"):
            load_audio(tmp_path / "secret.wav")


def raise_(error):
    raise error


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
