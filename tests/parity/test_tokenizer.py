"""The CTC tokenizer against the stored answers of Transformers 4.37.2."""

import json

import numpy as np
import pytest

from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer

from . import tokenizer_cases


def differing(ours, theirs, path=""):
    """Paths at which two JSON objects differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [at for key in ours | theirs for at in differing(ours.get(key), theirs.get(key), f"{path} > {key}")]
    return [] if ours == theirs else [f"{path}: {ours} instead of {theirs}"]


def test_answers_are_those_of_transformers(tmp_path):
    expected = json.loads(tokenizer_cases.REFERENCE.read_text(encoding="utf-8"))
    assert differing(tokenizer_cases.answers(Wav2Vec2CTCTokenizer, tmp_path), expected) == []


def test_batches_are_padded_and_masked():
    tokenizer = Wav2Vec2CTCTokenizer(tokenizer_cases.VOCABULARY)
    batch = tokenizer(["HELLO", "A TO"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(batch["input_ids"], [[9, 5, 10, 10, 8], [7, 4, 6, 8, 0]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert tokenizer.pad([{"input_ids": [7]}], pad_to_multiple_of=4)["input_ids"] == [[7, 0, 0, 0]]
    assert tokenizer.pad({"input_ids": [[7]]}, padding="max_length", max_length=3)["attention_mask"] == [[1, 0, 0]]
    assert tokenizer("HELLO")["input_ids"] == [9, 5, 10, 10, 8]


def test_unknown_characters_get_the_unknown_token_even_outside_of_the_vocabulary():
    tokenizer = Wav2Vec2CTCTokenizer({"A": 0, "B": 1, "|": 2})
    assert tokenizer.encode("AÉ") == [0, tokenizer.unk_token_id]


def test_batches_are_decoded_with_offsets():
    tokenizer = Wav2Vec2CTCTokenizer(tokenizer_cases.VOCABULARY)
    frames = np.array([[9, 9, 0, 5, 4, 7], [0, 6, 8, 8, 0, 0]])
    assert tokenizer.batch_decode(frames) == ["HE A", "TO"]
    decoded = tokenizer.batch_decode(frames, output_word_offsets=True)
    assert decoded.char_offsets is None
    assert decoded.word_offsets[0] == [
        {"word": "HE", "start_offset": 0, "end_offset": 4},
        {"word": "A", "start_offset": 5, "end_offset": 6},
    ]


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ({"A": "one"}, {}, "maps 'A' to 'one', which is no id"),
        ({"eng": {"A": 0}}, {}, "choose target_lang from eng"),
        ({"eng": {"A": 0}}, {"target_lang": "fra"}, "no language 'fra'; choose from eng"),
        ({"A": 0}, {"target_lang": "fra"}, "is of one language"),
    ],
)
def test_impossible_vocabularies_are_refused(vocabulary, options, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2CTCTokenizer(vocabulary, **options)


def test_broken_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json: no such vocabulary file"):
        Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r"vocab\.json is not valid JSON"):
        Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not map symbols to ids"):
        Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
