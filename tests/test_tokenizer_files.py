"""Tokenizers in the files of the installed Transformers: the same symbols and ids, there and back."""

import json
import random

import pytest
import transformers

from speech_flax import Wav2Vec2BertProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor
from speech_flax.audio.waveform_extraction import Wav2Vec2FeatureExtractor

SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABC'", "CH", "<noise>")
#: What texts are made of.
PIECES = ("A", "B", "C", "H", " ", "  ", "|", "CH", "<noise>", "<laugh>", "q", "<x>", "<s>", "<pad>", "[U]", "É", "\t")


def with_vocabulary(directory, symbols=SYMBOLS, **options):
    """A tokenizer of Transformers."""
    directory.mkdir()
    path = directory / "vocab.json"
    path.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path), clean_up_tokenization_spaces=False, **options)


def assert_alike(directory):
    """What both libraries load from ``directory`` is the same tokenizer."""
    ours = Wav2Vec2CTCTokenizer.from_pretrained(directory)
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(directory)
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert set(ours.all_special_ids) == set(theirs.all_special_ids) - {theirs.word_delimiter_token_id}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices(PIECES, k=generator.randint(0, 9)))
        assert ours(text)["input_ids"] == theirs(text).input_ids, text
        ids = generator.choices(range(len(theirs)), k=generator.randint(0, 12))
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("lower", [False, True])
def test_added_tokens_are_those_of_transformers(tmp_path, lower):
    tokenizer = with_vocabulary(tmp_path / "0", do_lower_case=lower)
    tokenizer.add_tokens(["<laugh>", "q"])
    tokenizer.add_tokens([transformers.AddedToken("<x>", lstrip=True, normalized=False)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["[U]"]})
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert len(Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "theirs")) == len(SYMBOLS) + 4
    assert_alike(tmp_path / "theirs")
    Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert_alike(tmp_path / "ours")


def test_added_tokens_in_a_file_of_their_own_are_read(tmp_path):
    """As Transformers wrote them before version 4.34."""
    with_vocabulary(tmp_path / "old", ("A", "B", "C", "|", "[UNK]", "[PAD]"))
    (tmp_path / "old/added_tokens.json").write_text(json.dumps({"<s>": 6, "</s>": 7, "<laugh>": 8}))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    special["pad_token"] = {"content": "[PAD]", "lstrip": False, "rstrip": False, "normalized": True}
    special["additional_special_tokens"] = ["<s>", "</s>"]
    (tmp_path / "old/special_tokens_map.json").write_text(json.dumps(special))
    options = {"unk_token": "?", "clean_up_tokenization_spaces": False}
    (tmp_path / "old/tokenizer_config.json").write_text(json.dumps(options))
    assert_alike(tmp_path / "old")
    ours = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "old")
    assert (ours.unk_token, len(ours), ours.convert_tokens_to_ids("<laugh>")) == ("[UNK]", 9, 8)


def test_special_tokens_that_are_null_do_not_exist(tmp_path):
    """Neither in the length, which is the number of outputs of a model, nor in the files that are written."""
    symbols = ("A", "B", "|", "[UNK]", "[PAD]")
    tokenizer = with_vocabulary(
        tmp_path / "0", symbols, bos_token=None, eos_token=None, unk_token="[UNK]", pad_token="[PAD]"
    )
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "theirs")
    assert len(ours) == len(symbols)
    assert (ours.bos_token, ours.bos_token_id, ours.eos_token, ours.eos_token_id) == (None,) * 4
    assert_alike(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert_alike(tmp_path / "ours")


def test_a_tokenizer_may_lack_the_unknown_and_the_padding_token(tmp_path):
    tokenizer = Wav2Vec2CTCTokenizer({"A": 0, "|": 1}, unk_token=None, pad_token=None, bos_token=None, eos_token=None)
    assert (len(tokenizer), tokenizer.unk_token_id, tokenizer.pad_token_id) == (2, None, None)
    assert tokenizer.decode([0, 1, 5, 0]) == "A A"
    with pytest.raises(ValueError, match="'B' is not in the vocabulary, and there is no unk_token"):
        tokenizer("AB")
    with pytest.raises(ValueError, match="without pad_token cannot pad"):
        tokenizer(["A", "AA"], padding=True)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"3": {"content": "<x>"}}, "'<x>' was added with the id 3, but the vocabulary has '<unk>' with the id 3"),
        ({"30": {"content": "CH"}}, "'CH' was added with the id 30, but the vocabulary has 'CH' with the id 9"),
        ({"30": {"content": "<x>", "single_word": True}}, "'<x>' is one for single words"),
        ({"x": {"content": "<x>"}}, "with the id 'x' is no text with a number"),
        ({"30": {"content": None}}, "the added token None"),
    ],
)
def test_added_tokens_that_cannot_be_had_are_refused(tmp_path, added, message):
    with_vocabulary(tmp_path / "0")
    (tmp_path / "0/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=message):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "0")


def test_tokens_added_for_one_language_do_not_disturb_another(tmp_path):
    vocabulary = {"eng": {"<pad>": 0, "A": 1, "<unk>": 2, "|": 3}, "fra": {"<pad>": 0, "É": 1, "CH": 2, "<unk>": 3}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    added = {"2": {"content": "CH", "lstrip": True, "rstrip": True}, "3": {"content": "<unk>"}}
    config = {"target_lang": "eng", "added_tokens_decoder": added, "bos_token": None, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == vocabulary["eng"]
    assert tokenizer.encode("ACH") == [1, 2, 2]
    tokenizer.set_target_lang("fra")
    assert tokenizer.encode("É CH") == [1, 2]


@pytest.mark.parametrize("kind", [Wav2Vec2Processor, Wav2Vec2BertProcessor])
def test_the_processor_that_a_tokenizer_is_part_of_is_named(tmp_path, kind):
    """Where the file of the feature extractor does not say it, ``AutoProcessor`` goes by that of the tokenizer."""
    extractor = kind.feature_extractor_class()
    kind(extractor, Wav2Vec2CTCTokenizer({symbol: i for i, symbol in enumerate(SYMBOLS)})).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    fields = json.loads(path.read_text())
    del fields["processor_class"]
    path.write_text(json.dumps(fields))
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path)).__name__ == kind.__name__
    Wav2Vec2CTCTokenizer({"A": 0}).save_pretrained(tmp_path / "alone")
    assert "processor_class" not in json.loads((tmp_path / "alone/tokenizer_config.json").read_text())
    assert isinstance(extractor, Wav2Vec2FeatureExtractor) == (kind is Wav2Vec2Processor)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "max_length": 3},
        {"padding": "max_length"},
        {"padding": "max_length", "max_length": 9, "pad_to_multiple_of": 4},
        {"padding": True, "pad_to_multiple_of": 4},
        {"padding": True, "max_length": 3},
        {"padding": "longest", "truncation": True, "max_length": 3},
        {"padding": "do_not_pad", "max_length": 3},
        {"padding": True, "truncation": "only_first", "max_length": 4, "pad_to_multiple_of": 2},
        {"truncation": True, "max_length": 3},
        {"truncation": False, "max_length": 3},
        {"truncation": True},
        {"max_length": 3},
        {"return_attention_mask": False},
    ],
    ids=str,
)
def test_lengths_are_made_as_transformers_makes_them(tmp_path, options):
    theirs = with_vocabulary(tmp_path / "0")
    ours = Wav2Vec2CTCTokenizer(tmp_path / "0/vocab.json")
    for text in ("ABCA", ["ABCAA", "A"], ["A B", "", "CAB"]):
        assert ours(text, **options) == dict(theirs(text, **options)), text
    rows = [
        {"input_ids": [5, 6, 7, 5, 5], "attention_mask": [1, 1, 1, 1, 0]},
        {"input_ids": [8], "attention_mask": [1]},
    ]
    if not {"truncation", "return_attention_mask"} & set(options):
        for encoded in (rows, rows[0], {"input_ids": [[5, 6], [7]]}):
            copy = json.loads(json.dumps(encoded))
            assert ours.pad(encoded, **options) == dict(theirs.pad(copy, **options))


def test_lengths_that_cannot_be_made_are_refused():
    tokenizer = Wav2Vec2CTCTokenizer({symbol: index for index, symbol in enumerate(SYMBOLS)})
    for options, message in (
        ({"truncation": True, "max_length": 5, "padding": True, "pad_to_multiple_of": 2}, "divide max_length"),
        ({"truncation": "only_second", "max_length": 5}, "truncation must be"),
        ({"padding": "left"}, "padding must be"),
        ({"return_tensors": "np"}, "rows of 1 to 2 ids make no array"),
        ({"return_tensors": "pt", "padding": True}, "must be 'np' or 'jax'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer(["A", "AB"], **options)
    for call in (tokenizer, tokenizer.pad):
        with pytest.raises(TypeError, match="max_lenght"):
            call({"input_ids": [[5]]} if call == tokenizer.pad else "A", max_lenght=3)
