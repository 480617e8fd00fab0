import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.metrics import ErrorRate, character_error_rate, word_error_rate

SENTENCES = st.lists(st.sampled_from(["a", "b", "ab", "", " "]), max_size=6).map(" ".join)
CORPORA = st.lists(st.tuples(SENTENCES, SENTENCES), max_size=6)


def edit_distance(reference, hypothesis):
    """The textbook recursion, one row at a time."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def test_known_counts():
    references = ["the cat sat on the mat", "good morning"]
    hypotheses = ["the bat sat on mat", "good good morning"]
    counts = ErrorRate.of_words(references, hypotheses)
    assert counts == ErrorRate(substitutions=1, deletions=1, insertions=1, reference_length=8)
    assert counts.errors == 3
    assert word_error_rate(references, hypotheses) == 3 / 8  # the mean of the sentences would be 5 / 12
    # "cat" -> "bat", "the " deleted, "good " inserted; 22 + 12 characters
    assert character_error_rate(references, hypotheses) == (1 + 4 + 5) / 34


def test_empty_references_count_insertions():
    assert word_error_rate(["", "one two"], ["three", "one two"]) == 0.5
    assert word_error_rate([""], ["three four"]) == 2.0
    assert character_error_rate([""], ["abc"]) == 3.0
    assert word_error_rate([""], [""]) == 0.0
    assert word_error_rate([], []) == 0.0
    assert word_error_rate(["one two"], [""]) == 1.0


def test_spaces_at_the_ends_and_between_words_do_not_make_words():
    assert word_error_rate(["  one   two "], ["one two"]) == 0.0
    assert character_error_rate([" one "], ["one"]) == 0.0
    assert character_error_rate(["one  two"], ["one two"]) == 1 / 8


@settings(max_examples=60, deadline=None)
@given(CORPORA, CORPORA)
def test_rates_are_those_of_jiwer_and_counts_add_up(first, second):
    pairs = first + second
    references, hypotheses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert word_error_rate(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))
    assert character_error_rate(references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses))
    for count, split in ((ErrorRate.of_words, str.split), (ErrorRate.of_characters, lambda text: list(text.strip()))):
        whole = count(references, hypotheses)
        total = ErrorRate()
        for part in (first, second):
            total += count([pair[0] for pair in part], [pair[1] for pair in part])
        assert total == whole
        assert whole.errors == sum(edit_distance(split(a), split(b)) for a, b in pairs)
        assert whole.reference_length == sum(len(split(a)) for a, _ in pairs)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="2 references cannot be compared with 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="lists of strings"):
        character_error_rate("abc", ["abc"])
