"""The feature extractor and the processor of HuBERT against those of Transformers."""

import json

import numpy as np
import pytest
import transformers

from speech_flax import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

#: Both compute in float32; sums of a thousand samples differ in the last digits.
TOLERANCE = 2e-6

RANDOM = np.random.RandomState(0)
#: Far from zero mean and unit variance, and of odd lengths.
WAVEFORMS = [(0.2 + 0.1 * RANDOM.standard_normal(length)).astype(np.float32) for length in (1001, 640, 403)]

CALLS = [
    {"padding": True},
    {"padding": True, "return_attention_mask": True},
    {"padding": "longest", "pad_to_multiple_of": 128, "return_attention_mask": True},
    {"padding": "max_length", "max_length": 1100, "return_attention_mask": True},
    {"padding": "max_length", "max_length": 1100},
    {"padding": "max_length", "max_length": 500, "truncation": True, "return_attention_mask": True},
    {"padding": True, "max_length": 500, "truncation": True, "pad_to_multiple_of": 64},
    {"padding": False},
    {"padding": False, "return_attention_mask": True},
    {"padding": "do_not_pad", "max_length": 500, "truncation": True},
]


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name in theirs:
        assert len(ours[name]) == len(theirs[name])
        for one, other in zip(ours[name], theirs[name], strict=True):
            other = np.asarray(other)
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}, {"padding_value": 0.5}])
def test_calls_give_what_transformers_gives(options):
    ours, theirs = Wav2Vec2FeatureExtractor(**options), transformers.Wav2Vec2FeatureExtractor(**options)
    for call in CALLS:
        assert_same(ours(WAVEFORMS, sampling_rate=16_000, **call), theirs(WAVEFORMS, sampling_rate=16_000, **call))


def test_without_mask_the_padding_takes_part_in_the_statistics():
    """The documented way to use HuBERT base: its padding is not zero."""
    padded = Wav2Vec2FeatureExtractor()(WAVEFORMS, padding=True, sampling_rate=16_000, return_tensors="np")
    alone = Wav2Vec2FeatureExtractor()(WAVEFORMS[2], sampling_rate=16_000, return_tensors="np")
    assert padded.input_values[2, -1] != 0
    assert abs(padded.input_values[2, :403] - alone.input_values[0]).max() > 0.5


@pytest.mark.parametrize(
    "speech", [WAVEFORMS[0], WAVEFORMS[0].astype(np.float64), WAVEFORMS[2].tolist(), np.stack([WAVEFORMS[0][:9]] * 2)]
)
def test_kinds_of_input(speech):
    ours = Wav2Vec2FeatureExtractor()(speech, sampling_rate=16_000, return_tensors="np")
    theirs = transformers.Wav2Vec2FeatureExtractor()(speech, sampling_rate=16_000, return_tensors="np")
    assert_same(ours, theirs)


def test_mistakes_are_explained():
    extractor = Wav2Vec2FeatureExtractor()
    with pytest.raises(ValueError, match="8000 Hz"):
        extractor(WAVEFORMS[0], sampling_rate=8000)
    with pytest.raises(ValueError, match="several channels"):
        extractor(np.zeros((1, 2, 50)), sampling_rate=16_000)
    with pytest.raises(ValueError, match="several channels"):
        extractor([np.zeros((2, 50))], sampling_rate=16_000)
    with pytest.raises(ValueError, match="need max_length"):
        extractor(WAVEFORMS, sampling_rate=16_000, truncation=True)
    with pytest.raises(ValueError, match="403 to 1001 make no array; pad them"):
        extractor(WAVEFORMS, sampling_rate=16_000, return_tensors="np")
    with pytest.raises(ValueError, match="padding_side"):
        Wav2Vec2FeatureExtractor(padding_side="left")


def test_digital_silence_and_an_empty_waveform_stay_finite():
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    output = extractor([np.zeros(50), np.zeros(0)], True, sampling_rate=16_000)
    assert not np.any(output.input_values)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processor")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFG"])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    ours = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(return_attention_mask=True), Wav2Vec2CTCTokenizer(directory / "vocab.json")
    )
    ours.save_pretrained(directory)
    return ours, transformers.Wav2Vec2Processor.from_pretrained(directory), directory


def test_processor_of_transformers_reads_ours_and_does_the_same(processors):
    ours, theirs, _ = processors
    texts = ["A BAD CAB", "FEED A", "G"]
    expected = theirs(audio=WAVEFORMS, padding=True, sampling_rate=16_000, return_tensors="np")
    expected["labels"] = theirs(text=texts, padding=True, return_tensors="np")["input_ids"]
    got = ours(audio=WAVEFORMS, text=texts, padding=True, sampling_rate=16_000, return_tensors="np")
    assert set(got) == {"input_values", "attention_mask", "labels"}
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], atol=TOLERANCE, rtol=0)
    ids = [[5, 5, 0, 4, 6, 6]]
    assert ours.batch_decode(ids) == theirs.batch_decode(ids) == ["A B"]


def test_processor_pads_what_was_extracted_before(processors):
    ours = processors[0]
    extracted = [{"input_values": ours(audio=one, sampling_rate=16_000).input_values[0]} for one in WAVEFORMS]
    got, expected = (one.pad(extracted, padding=True, return_tensors="np") for one in processors[:2])
    assert_same(got, expected)


def test_processor_goes_there_and_back(processors, tmp_path):
    ours, theirs, directory = processors
    again = Wav2Vec2Processor.from_pretrained(directory)
    assert again.feature_extractor.to_dict() == ours.feature_extractor.to_dict()
    theirs.save_pretrained(tmp_path)  # in one file, as Transformers 5 writes it
    from_theirs = Wav2Vec2Processor.from_pretrained(tmp_path).feature_extractor
    assert (from_theirs.return_attention_mask, from_theirs.do_normalize) == (True, True)
