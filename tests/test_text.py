"""Transcripts as models write them, and vocabularies of their characters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speech_flax.text.normalization import normalize_transcript
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.text.vocabulary import SPECIAL_SYMBOLS, build_vocabulary


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("Hello,  World!\n", {}, "hello world"),
        ("don\u2019t — do'nt", {}, "don't do'nt"),
        ("well-known $5", {"keep_characters": "-$"}, "well-known $5"),
        ("Straße ÉTÉ", {"case": "upper"}, "STRASSE ÉTÉ"),
        ("Keep Me, please", {"case": "keep", "punctuation": "keep"}, "Keep Me, please"),
        ("¿Qué? «sí»", {}, "qué sí"),
        ("e\u0301", {"case": "keep"}, "\u00e9"),
        ("İ", {}, "i\u0307"),
        ("नमस्ते।", {}, "नमस्ते"),
        ("?!…", {}, ""),
    ],
)
def test_a_transcript_is_normalised(text, options, expected):
    assert normalize_transcript(text, **options) == unicodedata.normalize("NFC", expected)


@given(st.text(), st.sampled_from(["lower", "keep"]), st.sampled_from(["remove", "keep"]))
def test_normalising_twice_changes_nothing(text, case, punctuation):
    once = normalize_transcript(text, case=case, punctuation=punctuation)
    assert normalize_transcript(once, case=case, punctuation=punctuation) == once
    assert once == " ".join(once.split())
    if punctuation == "remove":
        assert not any(unicodedata.category(character)[0] in "PS" for character in once if character != "'")


def test_a_vocabulary_holds_special_symbols_and_then_every_character_by_code_point():
    vocabulary = build_vocabulary(["ab cb", "e\u0301a\tz"])
    assert list(vocabulary) == [*SPECIAL_SYMBOLS, "a", "b", "c", "z", "é"]
    assert list(vocabulary.values()) == list(range(10))


def test_rare_characters_can_be_left_out():
    assert list(build_vocabulary(["aab", "ba x"], min_count=2)) == [*SPECIAL_SYMBOLS, "a", "b"]


@pytest.mark.parametrize(
    ("texts", "message"), [(["a|b"], "hold '|'"), (["", "  "], "hold no characters"), ([], "no ch")]
)
def test_transcripts_without_a_vocabulary_are_refused(texts, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        build_vocabulary(texts)


@given(st.lists(st.text(st.characters(exclude_characters="|", exclude_categories=["Cs"])), min_size=1))
def test_a_vocabulary_spells_the_transcripts_it_was_built_from(texts):
    texts = [normalize_transcript(text) for text in texts]
    if not any(texts):
        return
    tokenizer = Wav2Vec2CTCTokenizer(build_vocabulary(texts))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, group_tokens=False, clean_up_tokenization_spaces=False) == text
