"""Wav2Vec2BertProcessor: audio and text together, and its files there and back."""

import json

import numpy as np
import pytest
import transformers

from speech_flax import SeamlessM4TFeatureExtractor, Wav2Vec2BertProcessor, Wav2Vec2CTCTokenizer

VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "H": 6, "L": 7, "O": 8}
WAVEFORMS = [0.1 * np.random.RandomState(size).randn(size).astype(np.float32) for size in (4000, 2800)]


@pytest.fixture
def processor():
    return Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(padding_value=1), Wav2Vec2CTCTokenizer(VOCABULARY))


@pytest.fixture
def reference(processor, tmp_path):
    processor.save_pretrained(tmp_path / "ours")
    return transformers.Wav2Vec2BertProcessor.from_pretrained(tmp_path / "ours")


def test_transformers_loads_our_files_and_computes_the_same(processor, reference):
    options = {"sampling_rate": 16_000, "padding": True, "return_tensors": "np"}
    ours, theirs = processor(WAVEFORMS, **options), reference(audio=WAVEFORMS, **options)
    np.testing.assert_allclose(ours["input_features"], theirs["input_features"], atol=5e-4)
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours.input_features[1, -1, -1] == 1  # the padding value survived
    texts = ["HELLO", "HE LO"]
    assert processor(text=texts)["input_ids"] == reference(text=texts)["input_ids"]
    frames = [[6, 6, 5, 0, 7, 7, 0, 7, 8], [4, 6, 5, 4, 4, 7, 8, 0, 0]]
    assert processor.batch_decode(frames) == reference.batch_decode(frames) == ["HELLO", "HE LO"]
    assert processor.decode(np.array(frames[0])) == "HELLO"


def test_we_load_the_files_of_transformers(processor, reference, tmp_path):
    reference.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()  # Transformers 5 nests it in another file
    loaded = Wav2Vec2BertProcessor.from_pretrained(tmp_path / "theirs")
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.feature_extractor.padding_value == 1
    assert loaded.tokenizer.decode([6, 6, 0, 5]) == "HE"


def test_files_survive_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    Wav2Vec2BertProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {"preprocessor_config.json", "tokenizer_config.json", "vocab.json"} <= set(files)
    for name in files:
        assert json.loads((tmp_path / "first" / name).read_text()) == json.loads(
            (tmp_path / "second" / name).read_text()
        )


def test_audio_and_text_give_features_with_labels(processor):
    inputs = processor(WAVEFORMS, ["HELLO", "HE"], sampling_rate=16_000, padding=True, return_tensors="np")
    assert set(inputs) == {"input_features", "attention_mask", "labels"}
    np.testing.assert_array_equal(inputs["labels"], [[6, 5, 7, 7, 8], [6, 5, 0, 0, 0]])
    with pytest.raises(ValueError, match="audio, text or both"):
        processor()


def test_padding_of_stored_features_and_labels(processor, reference):
    features = [processor(waveform, sampling_rate=16_000) for waveform in WAVEFORMS]
    items = [
        {"input_features": one["input_features"][0], "attention_mask": one["attention_mask"][0]} for one in features
    ]
    labels = [{"input_ids": ids} for ids in processor(text=["HELLO", "HE"])["input_ids"]]
    padded = processor.pad(items, labels, return_tensors="np")
    np.testing.assert_array_equal(padded["labels"], [[6, 5, 7, 7, 8], [6, 5, 0, 0, 0]])
    together = processor(WAVEFORMS, sampling_rate=16_000, return_tensors="np")
    np.testing.assert_array_equal(padded["attention_mask"], together["attention_mask"])
    np.testing.assert_allclose(padded["input_features"], together["input_features"], atol=1e-6)
    without_masks = processor.pad([{"input_features": one["input_features"]} for one in items], return_tensors="np")
    expected = reference.feature_extractor.pad(
        [{"input_features": one["input_features"]} for one in items], return_tensors="np"
    )
    np.testing.assert_array_equal(without_masks["attention_mask"], expected["attention_mask"])
    with pytest.raises(ValueError, match="input_features, labels or both"):
        processor.pad()


@pytest.mark.parametrize(
    "options", [{"padding": "max_length", "max_length": 40}, {"padding": True, "pad_to_multiple_of": 8}], ids=str
)
def test_static_shapes_are_made_for_text_too(processor, reference, options):
    texts = ["HELLO", "HE"]
    ours, theirs = (one(text=texts, return_tensors="np", **options) for one in (processor, reference))
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
    both = processor(WAVEFORMS, texts, sampling_rate=16_000, return_tensors="np", **options)
    np.testing.assert_array_equal(both["labels"], theirs["input_ids"])
    labels = [{"input_ids": ids} for ids in processor(text=texts)["input_ids"]]
    ours, theirs = (one.pad(labels=labels, return_tensors="np", **options) for one in (processor, reference))
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    assert processor(text="HELLO", max_length=3)["input_ids"] == reference(text="HELLO", max_length=3)["input_ids"]


def test_unknown_options_are_refused(processor):
    for call in (
        lambda: processor(WAVEFORMS[0], sampling_rate=16_000, max_lenght=3),
        lambda: processor(text="HELLO", max_lenght=3),
        lambda: processor.pad(labels=[{"input_ids": [5]}], max_lenght=3),
    ):
        with pytest.raises(TypeError, match="max_lenght"):
            call()


def test_missing_files_are_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json does not exist"):
        Wav2Vec2BertProcessor.from_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab\.json does not exist"):
        Wav2Vec2BertProcessor.from_pretrained(tmp_path)
