"""Verification of speakers: how trials are found and scored, and what cannot be scored."""

import dataclasses
import itertools
import logging
import string
import tracemalloc
from unittest.mock import create_autospec

import numpy as np
import pytest
from tone_corpus import TINY_MODEL

from speech_flax.data.sources import DataSource, Utterances
from speech_flax.data.tables import SourceError
from speech_flax.data.trials import Trial, find_trials
from speech_flax.metrics import equal_error_rate, pair_scores, trial_scores
from speech_flax.training.corpus import Split
from speech_flax.training.evaluation import check_evaluations
from speech_flax.training.experiment import DataSettings, Experiment, ExperimentError, ModelSettings
from speech_flax.training.task import ScoredRow
from speech_flax.training.tasks.speakers import SpeakerTask


def task(*trials: tuple[bool, str, str]) -> SpeakerTask:
    """Scored on these trials, or on all pairs."""
    data, model = DataSettings(DataSource("here")), ModelSettings(config=TINY_MODEL)
    made, _ = SpeakerTask.make(Experiment(data, "runs/none", task="xvector", model=model), ["X", "Y"])
    return dataclasses.replace(made, trials=tuple(Trial(*trial) for trial in trials) or None)


def embedded(count: int, features: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Embeddings of length 1 that are alike if they are of the same of ten speakers."""
    random = np.random.default_rng(seed)
    speakers = np.arange(count) % 10
    embeddings = random.standard_normal((count, features)) + 0.5 * random.standard_normal((10, features))[speakers]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings.astype(np.float32), [f"s{speaker}" for speaker in speakers]


@pytest.mark.parametrize("count", [0, 1, 2, 256, 600])
def test_all_pairs_are_scored_once(count):
    embeddings, speakers = embedded(count, 16)
    scores, same = pair_scores(embeddings, speakers)
    pairs = list(itertools.combinations(range(count), 2))
    left, right = np.array(pairs, int).reshape(-1, 2).T
    expected = (embeddings[left] * embeddings[right]).sum(-1)
    np.testing.assert_allclose(np.sort(scores), np.sort(expected), atol=1e-6)
    alike = np.array([speakers[a] == speakers[b] for a, b in pairs], bool)
    np.testing.assert_allclose(np.sort(scores[same]), np.sort(expected[alike]), atol=1e-6)
    if count > 2:
        assert equal_error_rate(scores, same) == pytest.approx(equal_error_rate(expected, alike), abs=1e-4)


def test_lists_of_trials_are_scored_in_their_order():
    embeddings, _ = embedded(50, 16)
    first, second = np.random.default_rng(1).integers(0, 50, (2, 20_000))
    expected = (embeddings[first] * embeddings[second]).sum(-1)
    np.testing.assert_array_equal(trial_scores(embeddings, first, second), expected)


def test_memory_of_all_pairs_is_that_of_their_scores():
    """Not of two embeddings and a trial for each: a hundred times as much."""
    embeddings, speakers = embedded(1200, 256)
    rows = [
        ScoredRow(str(index), speaker, row.tolist())
        for index, (speaker, row) in enumerate(zip(speakers, embeddings, strict=True))
    ]
    tracemalloc.start()
    numbers = task().score(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers["trials"] == 1200 * 1199 // 2
    assert peak < 40 * numbers["trials"] + 4 * embeddings.nbytes


def test_equal_error_rate_of_a_task_is_that_of_its_trials():
    rows = [ScoredRow(name, name, [value, 1.0]) for name, value in (("a", 1.0), ("b", 1.1), ("c", -1.0), ("d", 0.9))]
    numbers = task((True, "a", "b"), (False, "a", "c"), (False, "a", "d"), (True, "c", "d")).score(rows)
    assert numbers == {"equal_error_rate": 0.5, "trials": 4}


def test_trials_of_other_utterances_are_left_out_with_a_warning(caplog):
    trials = [Trial(True, "a", "b"), Trial(False, "a", "x"), Trial(False, "c", "a")]
    with caplog.at_level(logging.WARNING, logger="speech_flax"):
        first, second, same = find_trials(trials, ["a", "b", "c"])
    assert (first.tolist(), second.tolist(), same.tolist()) == ([0, 2], [1, 0], [True, False])
    assert "1 of 3 trials are left out: there is no utterance x, for one, but a, for one" in caplog.text
    with pytest.raises(
        SourceError, match=r"^all 3 trials are left out: there is no utterance a, .* but wav/a, for one"
    ):
        find_trials(trials, ["wav/a", "wav/b"])


def split(speakers: str) -> Split:
    """Utterances a, b, ... by speakers whose names are one letter each."""
    utterances = create_autospec(Utterances, instance=True)
    utterances.ids.return_value = list(string.ascii_lowercase[: len(speakers)])
    split = create_autospec(Split, instance=True, utterances=utterances)
    split.labels.return_value = list(speakers)
    return split


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (
            [(True, "wav/a", "wav/c"), (False, "wav/a", "wav/b")],
            "all 2 trials are left out: there is no utterance wav/a",
        ),
        ([(True, "a", "c")], "no trial is of different speakers"),
        ([(False, "a", "b"), (True, "a", "x")], "no trial is of the same speaker"),
    ],
)
def test_data_without_trials_of_both_kinds_are_refused_by_name(trials, message):
    splits = {"train": split("X"), "test": split("XYXY")}
    check_evaluations(splits, task())
    check_evaluations(splits, task((True, "a", "c"), (False, "a", "b")))
    with pytest.raises(ExperimentError, match=f"^data.test: {message}"):
        check_evaluations(splits, task(*trials))


@pytest.mark.parametrize(("speakers", "kind"), [("XX", "different speakers"), ("XY", "the same speaker"), ("X", "the")])
def test_pairs_of_one_kind_are_refused(speakers, kind):
    with pytest.raises(ExperimentError, match=f"data.validation: no trial is of {kind}"):
        check_evaluations({"validation": split(speakers)}, task())
