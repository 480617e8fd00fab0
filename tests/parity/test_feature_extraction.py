"""SeamlessM4TFeatureExtractor against that of Transformers, which computes with NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.audio.feature_extraction import SeamlessM4TFeatureExtractor
from speech_flax.audio.log_mel import log_mel

#: Of features normalised to unit variance; float32 against float64.
TOLERANCE = 5e-4

OURS, THEIRS = SeamlessM4TFeatureExtractor(), transformers.SeamlessM4TFeatureExtractor()


def speech_like(samples, seed=0, level=0.1):
    """Tones with overtones that glide and fade, over a floor of noise."""
    rng = np.random.RandomState(seed)
    time = np.arange(samples) / 16_000
    pitch = rng.uniform(80, 250) * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 4) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    voice = sum(np.sin(overtone * phase) / overtone for overtone in range(1, 12))
    loudness = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2, 6) * time)
    return (level * (loudness * voice / 3 + 0.02 * rng.randn(samples))).astype(np.float32)


def assert_same(raw_speech, ours=OURS, theirs=THEIRS, **options):
    options = {"sampling_rate": 16_000, "return_tensors": "np"} | options
    got, expected = ours(raw_speech, **options), theirs(raw_speech, **options)
    assert set(got) == set(expected)
    np.testing.assert_array_equal(np.asarray(got["attention_mask"]), np.asarray(expected["attention_mask"]))
    assert np.shape(got["input_features"]) == np.shape(expected["input_features"])
    np.testing.assert_allclose(got["input_features"], expected["input_features"], atol=TOLERANCE)
    return got


@settings(max_examples=12, deadline=None)
@given(st.integers(720, 15_999), st.integers(0, 1000), st.sampled_from([1e-4, 1e-2, 0.5, 1.0]))
def test_one_utterance(samples, seed, level):
    assert_same(speech_like(samples, seed, level))


@pytest.mark.parametrize("samples", [399, 400, 560, 719, 720, 879, 880, 8000])
def test_lengths_at_the_borders_of_frames(samples):
    """Fewer than 400 samples make no frame; the odd last frame fills half a vector, which is masked."""
    waveform = speech_like(samples)
    if 400 <= samples < 560:  # one frame: see below
        got, expected = OURS(waveform, sampling_rate=16_000), THEIRS(waveform, sampling_rate=16_000)
        np.testing.assert_array_equal(got["attention_mask"], np.asarray(expected["attention_mask"]))
        assert got["input_features"].shape == np.shape(expected["input_features"])
    else:
        assert_same(waveform)


def test_a_single_frame_is_zero_where_the_reference_has_no_number():
    assert np.isnan(np.asarray(THEIRS(speech_like(400), sampling_rate=16_000)["input_features"])[0, 0, :80]).all()
    np.testing.assert_array_equal(OURS(speech_like(400), sampling_rate=16_000)["input_features"], np.zeros((1, 1, 160)))


def test_silence_is_zero_where_the_reference_has_a_rounding_error():
    silence = np.zeros(8000, np.float32)
    theirs = np.asarray(THEIRS(silence, sampling_rate=16_000)["input_features"])
    ours = OURS(silence, sampling_rate=16_000)["input_features"]
    np.testing.assert_array_equal(ours, np.zeros(theirs.shape))
    np.testing.assert_allclose(ours, theirs, atol=3.1e-3)


def test_silence_before_speech_and_clipped_speech():
    assert_same(np.concatenate([np.zeros(4000, np.float32), speech_like(6000)]))
    assert_same(np.clip(speech_like(8000, level=4.0), -1, 1))


def test_batches_of_different_lengths():
    batch = [speech_like(samples, samples) for samples in (5000, 7777, 3210)]
    assert_same(batch)
    assert_same(batch, pad_to_multiple_of=8)
    assert_same(batch, padding="max_length", max_length=60)
    assert_same(batch, padding="longest")
    assert_same(batch, truncation=True, max_length=30, padding="max_length")
    other = {"padding_value": 1.0}
    assert_same(batch, SeamlessM4TFeatureExtractor(**other), transformers.SeamlessM4TFeatureExtractor(**other))


@pytest.mark.parametrize("padding", [True, "max_length", "do_not_pad"])
@pytest.mark.parametrize("max_length", [29, 30, 33])
@pytest.mark.parametrize("multiple", [2, None, 3, 8])
def test_utterances_are_cut_to_frames_and_not_to_vectors(padding, max_length, multiple):
    batch = [speech_like(400 + 160 * frames - 160, frames) for frames in (47, 40, 50)]
    options = {"truncation": True, "max_length": max_length, "padding": padding, "pad_to_multiple_of": multiple}
    assert_same(batch, **options)
    assert_same([batch[0], batch[0][: 400 + 160 * 20]], **options | {"padding": "max_length"})


@pytest.mark.parametrize("frames", [20, 21])
@pytest.mark.parametrize("multiple", [2, None, 3])
def test_one_utterance_without_padding(frames, multiple):
    assert_same(speech_like(400 + 160 * (frames - 1)), padding=False, pad_to_multiple_of=multiple)
    assert_same(speech_like(400 + 160 * (frames - 1)), padding=True, pad_to_multiple_of=multiple)


def stored(*lengths, masks=False, seed=0):
    rng = np.random.RandomState(seed)
    items = [{"input_features": rng.randn(length, 160).astype(np.float32)} for length in lengths]
    for item in items if masks else ():
        item["attention_mask"] = np.arange(len(item["input_features"])) < len(item["input_features"]) - 1
        item["attention_mask"] = item["attention_mask"].astype(np.int32)
    return items


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "longest"},
        {"padding": "max_length", "max_length": 40},
        {"pad_to_multiple_of": 32},
        {"padding": "max_length", "max_length": 33, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 12},
        {"truncation": True, "max_length": 12, "padding": "max_length"},
        {"truncation": True, "max_length": 9, "pad_to_multiple_of": 4},
        {"truncation": True, "max_length": 10, "padding": False},
    ],
)
def test_stored_features_are_padded_as_asked(options, masks):
    got = SeamlessM4TFeatureExtractor(padding_value=1).pad(stored(10, 17, masks=masks), return_tensors="np", **options)
    theirs = transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    expected = theirs.pad(stored(10, 17, masks=masks), return_tensors="np", **options)
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_stored_features_may_be_columns():
    items = stored(9, 9, masks=True)
    columns = {name: np.stack([item[name] for item in items]) for name in items[0]}
    for features in (items, columns, {name: list(values) for name, values in columns.items()}):
        padded = OURS.pad(features, pad_to_multiple_of=4)
        assert padded.input_features.shape == (2, 12, 160)
        np.testing.assert_array_equal(padded.attention_mask, [[1] * 8 + [0] * 4] * 2)
    assert set(OURS.pad(columns, return_attention_mask=False)) == {"input_features"}


def test_options_that_do_not_exist_or_miss_something_are_refused():
    with pytest.raises(TypeError, match="pad_to_multiple"):
        OURS.pad(stored(3), pad_to_multiple=4)
    with pytest.raises(ValueError, match=r"padding must be one of True, False, 'longest', .* not 'longer'"):
        OURS.pad(stored(3), padding="longer")
    with pytest.raises(ValueError, match="features to pad need 'input_features', but have 'input_values'"):
        OURS.pad([{"input_values": np.zeros(3)}])
    for options in ({"truncation": True}, {"padding": "max_length"}):
        with pytest.raises(ValueError, match="need max_length"):
            OURS(speech_like(4000), sampling_rate=16_000, **options)


def test_the_file_says_whether_there_is_a_mask(tmp_path):
    transformers.SeamlessM4TFeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    loaded = SeamlessM4TFeatureExtractor.from_pretrained(tmp_path)
    assert set(loaded(speech_like(4000), sampling_rate=16_000)) == {"input_features"}
    assert loaded.to_dict()["return_attention_mask"] is False
    assert "attention_mask" in loaded(speech_like(4000), sampling_rate=16_000, return_attention_mask=True)


def test_without_padding_every_utterance_keeps_its_length():
    batch = [speech_like(samples) for samples in (400 + 160 * 9, 400 + 160 * 19)]  # even numbers of frames
    options = {"padding": False, "return_tensors": None, "sampling_rate": 16_000}
    got = OURS(batch, **options)["input_features"]
    assert [len(one) for one in got] == [5, 10]
    for ours, waveform in zip(got, batch, strict=True):  # the reference takes one at a time
        theirs = THEIRS(waveform, padding=False, sampling_rate=16_000)["input_features"][0]
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    with pytest.raises(ValueError, match="of length 5 to 10 make no array; pad them"):
        OURS(batch, padding=False, sampling_rate=16_000)


def test_types_and_shapes_of_audio():
    mono = speech_like(4000)
    expected = assert_same(mono)["input_features"]
    for raw_speech in (mono.astype(np.float64), mono.tolist(), [mono], [mono.tolist()], mono[None], jnp.asarray(mono)):
        got = OURS(raw_speech, sampling_rate=16_000)["input_features"]
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    other = speech_like(4000, 1)
    assert_same(np.stack([mono, other]))  # two utterances
    assert_same(np.stack([mono, other])[None])  # one of two channels: the left one counts
    assert_same([np.stack([mono, other]), np.stack([other, mono])])


def test_the_sampling_rate_is_checked(caplog):
    with pytest.raises(ValueError, match="trained at 16000 Hz, but the audio has 8000 Hz; resample it"):
        OURS(speech_like(4000), sampling_rate=8000)
    OURS(speech_like(4000))
    assert "sampling_rate was not given" in caplog.text
    with pytest.raises(ValueError, match="at most batch, channels and samples"):
        OURS(np.zeros((1, 1, 1, 400)), sampling_rate=16_000)


def test_the_function_on_the_device_ignores_what_lies_in_the_padding():
    lengths = np.array([5000, 8000])
    waveforms = np.stack([np.pad(speech_like(5000), (0, 3000)), speech_like(8000, 1)])
    features, mask = log_mel(waveforms, lengths)
    waveforms[0, 5000:] = np.nan
    garbage, other_mask = log_mel(waveforms, lengths)
    np.testing.assert_array_equal(np.asarray(features)[np.asarray(mask)], np.asarray(garbage)[np.asarray(other_mask)])
    alone = OURS(waveforms[0, :5000], sampling_rate=16_000)["input_features"][0]
    np.testing.assert_allclose(np.asarray(features)[0, : len(alone)], alone, atol=2e-5)
    assert np.isfinite(np.asarray(garbage)).all()
