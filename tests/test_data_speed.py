"""Utterances at several speeds: what they sound like, what they are called, and that batches hold all of them."""

import numpy as np
import pytest
import soundfile

from speech_flax.data.buckets import Bucket, duration_samples
from speech_flax.data.loader import BatchLoader
from speech_flax.data.plan import BatchPlan
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.speed import SpeedPerturbed

FACTORS = (0.8, 1.0, 1.25)
HERTZ = (400.0, 1000.0)


@pytest.fixture
def utterances(tmp_path):
    """Two tones of half a second."""
    for name, hertz in zip("ab", HERTZ, strict=True):
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(8000) / 16_000)
        soundfile.write(tmp_path / f"{name}.wav", tone.astype(np.float32), 16_000)
    (tmp_path / "table.csv").write_text("audio,text\na.wav,low\nb.wav,high\n")
    return open_source(DataSource(str(tmp_path / "table.csv")))


def loudest_hertz(waveform):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(waveform.size)))
    return spectrum.argmax() * 16_000 / waveform.size


def test_faster_is_shorter_and_higher_and_the_plan_is_told_so(utterances):
    perturbed = SpeedPerturbed(utterances, FACTORS)
    assert len(perturbed) == 6
    planned = duration_samples(perturbed.durations())
    for index in range(6):
        factor, hertz = FACTORS[index // 2], HERTZ[index % 2]
        waveform = perturbed.waveform(index)
        assert abs(waveform.size - 8000 / factor) <= 1
        assert abs(planned[index] - waveform.size) <= 1
        assert loudest_hertz(waveform) == pytest.approx(hertz * factor, rel=0.01)
        assert np.abs(waveform).max() == pytest.approx(0.5, rel=0.05)


def test_the_unchanged_speed_is_the_utterance_itself(utterances):
    perturbed = SpeedPerturbed(utterances, FACTORS)
    np.testing.assert_array_equal(perturbed.waveform(3), utterances.waveform(1))
    assert list(perturbed.ids()) == ["a.wav@0.8", "b.wav@0.8", "a.wav", "b.wav", "a.wav@1.25", "b.wav@1.25"]
    assert list(perturbed.texts()) == ["low", "high"] * 3
    assert perturbed[5] == utterances[1]


def test_an_epoch_hears_every_utterance_at_every_speed(utterances):
    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

    perturbed = SpeedPerturbed(utterances, FACTORS)
    plan = BatchPlan(duration_samples(perturbed.durations()), [Bucket(0.5, 2), Bucket(0.7, 2)])
    batches = list(BatchLoader(plan, perturbed, Letters()).batches())
    heard = [name for batch in batches for name in batch.ids if name]
    assert sorted(heard) == sorted(perturbed.ids())
    assert not any(batch.bad for batch in batches)


@pytest.mark.parametrize("factors", [(), (0.9, 0.0), (-1.0,)])
def test_speeds_that_are_none_are_refused(utterances, factors):
    with pytest.raises(ValueError, match="speed factors must be positive"):
        SpeedPerturbed(utterances, factors)
