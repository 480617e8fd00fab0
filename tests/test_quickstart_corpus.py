"""The corpus in the repository is what its scripts make, and a fair test: new sentences, new voices, known words."""

import csv
import importlib.util
import itertools
from pathlib import Path

import pytest
import soundfile

from speech_flax.data.sources import open_source
from speech_flax.training.experiment import read_experiment

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "data" / "quickstart"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (CORPUS / "metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def splits(rows) -> dict[str, list[dict[str, str]]]:
    names = ("train", "validation", "test")
    assert {row["split"] for row in rows} == set(names)
    return {name: [row for row in rows if row["split"] == name] for name in names}


def test_no_sentence_and_no_voice_is_in_two_splits(splits):
    for left, right in itertools.combinations(splits.values(), 2):
        assert not {row["text"] for row in left} & {row["text"] for row in right}
        assert not {family(row["voice"]) for row in left} & {family(row["voice"]) for row in right}


def family(voice: str) -> str:
    """``en-gb+steph2`` and ``en-us+steph`` are one voice; ``f1`` to ``f5`` and ``m1`` to ``m8`` are different ones."""
    variant = voice.split("+")[1].lower()
    return variant if len(variant) == 2 else variant.rstrip("0123456789")


def test_training_says_every_word_of_the_test_and_several_hundred_in_all(splits):
    words = {name: {word for row in split for word in row["text"].split()} for name, split in splits.items()}
    assert words["test"] <= words["train"]
    assert len(words["train"]) > 200
    assert len(words["test"]) > 180
    assert len(splits["train"]) > 500
    assert len({row["voice"] for row in splits["train"]}) > 100


def test_sentences_are_those_that_the_grammar_tells(rows):
    spec = importlib.util.spec_from_file_location("sentences", CORPUS / "sentences.py")
    sentences = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sentences)
    seed = int((CORPUS / "make_corpus.py").read_text().split("SEED = ")[1].split()[0])
    assert [row["text"] for row in rows] == list(itertools.islice(sentences.sentences(seed), len(rows)))


def test_every_file_is_there_at_the_models_rate_and_of_the_length_that_is_written(rows):
    for row in rows:
        information = soundfile.info(CORPUS / row["file_name"])
        assert (information.samplerate, information.channels) == (16_000, 1)
        assert information.duration == pytest.approx(float(row["seconds"]), abs=1e-3)
    assert len(list(CORPUS.rglob("*.opus"))) == len(rows)


def test_the_corpus_takes_four_megabytes_at_most():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.suffix in (".opus", ".csv", ".py")) <= 4e6


def test_the_configuration_finds_its_splits(monkeypatch, splits):
    monkeypatch.chdir(ROOT)
    experiment = read_experiment("configs/quickstart.yaml")
    for name, rows in splits.items():
        utterances = open_source(getattr(experiment.data, name))
        assert len(utterances) == len(rows)
        assert utterances.durations().max() < 6
