import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speech_flax.metrics import (
    ErrorRate,
    FrameCounts,
    accuracy,
    character_error_rate,
    equal_error_rate,
    macro_f1,
    mean_absolute_error,
    mean_squared_error,
    pearson_correlation,
    word_error_rate,
)

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


def test_classes_are_scored_by_accuracy_and_mean_f1():
    references, predictions = list("aabbc"), list("abbbd")
    assert accuracy(references, predictions) == pytest.approx(3 / 5)
    # F1 of a: 2/3, of b: 4/5, of c and d, which never meet: 0
    assert macro_f1(references, predictions) == pytest.approx((2 / 3 + 4 / 5) / 4)


def test_frames_are_counted_by_frame_and_by_label():
    reference = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)
    prediction = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    counts = FrameCounts.of(reference, prediction)
    assert counts == FrameCounts(frames=4, wrong_frames=2, hits=3, misses=1, false_alarms=1)
    assert (counts + counts).error_rate == 0.5 and counts.f1 == pytest.approx(6 / 8)
    silent = np.zeros((2, 1), bool)
    assert FrameCounts.of(silent, silent).f1 == 1


def test_values_are_scored():
    assert mean_squared_error([1.0, 2.0], [2.0, 4.0]) == 2.5 and mean_absolute_error([1.0, 2.0], [2.0, 4.0]) == 1.5
    assert pearson_correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert pearson_correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0


@pytest.mark.parametrize(
    ("same", "different", "expected"),
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.15, 0.9], [0.1, 0.2], 0.5),
        ([0.5, 0.5], [0.5, 0.5], 0.5),
        ([0.3, 0.7, 0.8, 0.9], [0.1, 0.2, 0.25, 0.6], 0.25),
    ],
)
def test_equal_error_rate_is_where_both_kinds_of_errors_are_alike(same, different, expected):
    labels = np.array([True] * len(same) + [False] * len(different))
    assert equal_error_rate(np.array(same + different), labels) == pytest.approx(expected)


def test_what_is_no_number_is_not_scored_as_one():
    nothing = float("nan")
    assert np.isnan(equal_error_rate(np.array([0.9, 0.1, nothing]), np.array([True, False, False])))
    assert np.isnan(pearson_correlation([1.0, 2.0], [nothing, nothing]))


def test_equal_error_rate_needs_both_kinds_of_trials():
    with pytest.raises(ValueError, match="both kinds"):
        equal_error_rate(np.array([0.1, 0.2]), np.array([True, True]))
