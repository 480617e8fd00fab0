"""What training computes on the device is what the feature extractors of Transformers compute on the host."""

import jax
import numpy as np
import pytest
import transformers

from speech_flax.training.front_end import LogMelFrontEnd, WaveformFrontEnd

LENGTHS = np.array([5003, 3201, 4001], np.int32)
RANDOM = np.random.RandomState(0)
#: Far from zero mean and unit variance; an even and two odd numbers of frames of 10 ms.
WAVEFORMS = [(0.05 + 0.1 * RANDOM.standard_normal(length)).astype(np.float32) for length in LENGTHS]


def padded(samples: int) -> np.ndarray:
    """The waveforms as a batch, with garbage in its padding."""
    batch = np.full((len(WAVEFORMS), samples), 7.0, np.float32)
    for row, waveform in zip(batch, WAVEFORMS, strict=True):
        row[: len(waveform)] = waveform
    return batch


@pytest.mark.parametrize("samples", [5003, 5600])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_waveforms_are_those_of_the_extractor_with_a_mask(do_normalize, samples):
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=True)(
        WAVEFORMS, sampling_rate=16_000, padding="max_length", max_length=samples, return_tensors="np"
    )
    values, mask = jax.jit(WaveformFrontEnd(do_normalize))(padded(samples), LENGTHS)
    np.testing.assert_array_equal(mask, theirs["attention_mask"].astype(bool))
    # float32 sums of some thousand samples, in another order
    np.testing.assert_allclose(values, theirs["input_values"], atol=5e-6, rtol=0)


def test_waveforms_are_those_of_the_extractor_without_a_mask_for_each_utterance_alone():
    values, _ = jax.jit(WaveformFrontEnd())(padded(5600), LENGTHS)
    extractor = transformers.Wav2Vec2FeatureExtractor()
    for row, waveform in zip(values, WAVEFORMS, strict=True):
        alone = extractor(waveform, sampling_rate=16_000, return_tensors="np")["input_values"][0]
        np.testing.assert_allclose(row[: len(waveform)], alone, atol=5e-6, rtol=0)


def test_rows_without_audio_are_zero():
    values, mask = jax.jit(WaveformFrontEnd())(padded(5003), np.zeros(3, np.int32))
    np.testing.assert_array_equal(values, 0)
    assert not mask.any()


@pytest.mark.parametrize(("num_mel_bins", "stride", "padding_value"), [(80, 2, 0.0)])
def test_log_mel_vectors_are_those_of_the_extractor(num_mel_bins, stride, padding_value):
    extractor = transformers.SeamlessM4TFeatureExtractor(
        feature_size=num_mel_bins, num_mel_bins=num_mel_bins, stride=stride, padding_value=padding_value
    )
    theirs = extractor(WAVEFORMS, sampling_rate=16_000, return_tensors="np", pad_to_multiple_of=stride)
    features, mask = jax.jit(LogMelFrontEnd(num_mel_bins, stride, padding_value))(padded(5003), LENGTHS)
    frames = theirs["input_features"].shape[1]
    np.testing.assert_array_equal(mask[:, :frames], theirs["attention_mask"].astype(bool))
    assert not mask[:, frames:].any()
    # features have unit variance; float32 against float64
    np.testing.assert_allclose(features[:, :frames], theirs["input_features"], atol=5e-4, rtol=0)
