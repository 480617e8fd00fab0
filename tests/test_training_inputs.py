"""A mistake in what a run is given ends in one sentence and a non-zero exit code, with nothing written."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_cache import hub_cache
from jax.experimental import multihost_utils
from streamed_corpus import write_tar_shards
from tone_corpus import write_config, write_corpus

from speech_flax.cli import main
from speech_flax.configuration import HubertConfig
from speech_flax.data.sources import DataSource
from speech_flax.text.tokenizer import Wav2Vec2CTCTokenizer
from speech_flax.training.corpus import open_split
from speech_flax.training.experiment import (
    DataSettings,
    Experiment,
    ExperimentError,
    MeshSettings,
    ModelSettings,
    OptimizerSettings,
    read_experiment,
)
from speech_flax.training.processes import check_agreement, together
from speech_flax.training.run_directory import RunDirectory
from speech_flax.training.sharding import make_mesh
from speech_flax.training.stream_corpus import check_streamable
from speech_flax.training.tasks.ctc import check_characters


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 6, "validation": 2})


@pytest.fixture
def refused(corpus, tmp_path, capfd):
    """Runs ``train`` on a changed configuration and returns its one sentence."""

    def run(*options: str, **fields: object) -> str:
        directory = tmp_path / "run"
        config = write_config(tmp_path / "config.yaml", corpus, directory, **fields)
        before = sorted(tmp_path.rglob("*"))
        assert main(["train", "--config", str(config), *options]) == 1
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert "Traceback" not in error
        return error

    return run


def test_unknown_key_is_refused_with_the_nearest_name(refused):
    error = refused(optimizer={"learning_rat": 1e-3})
    assert "learning_rat" in error and "did you mean 'learning_rate'?" in error


def test_unknown_option_is_refused_with_the_nearest_name(refused):
    error = refused("--optimizer.warmpu=0.1")
    assert "warmpu" in error and "did you mean 'warmup'?" in error


def test_unknown_model_field_is_refused_with_the_nearest_name(refused):
    error = refused(model={"config": {"hiden_size": 16}})
    assert "hiden_size" in error and "hidden_size" in error.replace("hiden_size", "")


def test_wrong_type_names_the_field_and_the_value(refused):
    error = refused(steps="many")
    assert "steps" in error and "many" in error


def test_command_refuses_a_model_field_of_the_wrong_type(corpus, tmp_path):
    """In its own process: the checks of shapes and types that the tests switch on would speak first in this one."""
    config = write_config(tmp_path / "config.yaml", corpus, tmp_path / "run", model={"config": {"hidden_size": "wide"}})
    script = Path(__file__).parents[1] / "train.py"
    done = subprocess.run([sys.executable, str(script), "--config", str(config)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: model: config field 'hidden_size' must be int, not 'wide'\n"
    assert not (tmp_path / "run").exists()


def test_impossible_value_names_the_field(refused):
    assert "checkpoint_every is 0" in refused(checkpoint_every=0)
    assert "profile_steps" in refused(profile_steps=[5, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed=-1"], "seed is -1; it must be at least 0 and below 2**63"),
        (["--hang_minutes=-1"], "hang_minutes is -1.0; it must be at least 0"),
        (["--model.scan_unroll=0"], "model.scan_unroll is 0; it must be at least 1"),
        (["--model.frozen=[(]"], "model.frozen: '(' is no regular expression: missing ), unterminated subpattern"),
        (["--features.stride=0"], "features.stride is 0; it must be at least 1"),
        (["--features.num_mel_bins=0"], "features.num_mel_bins is 0; it must be at least 1"),
        (["--data.batch_seconds=.nan"], "data.batch_seconds is nan; it must be positive"),
        (["--data.speed_factors=[]"], "data.speed_factors is []; it must hold numbers that are positive"),
        (["--data.cache_decoded_mb=-4"], "data.cache_decoded_mb is -4; it must be at least 0"),
        (["--data.max_bad_fraction=5"], "data.max_bad_fraction is 5.0; it must be a share, from 0 to 1"),
        (["--data.trials=list.txt"], "data.trials is what task xvector is scored on; task ctc has no use for it"),
        (["--optimizer.learning_rate=0", "--optimizer.head_learning_rate=1e-3"], "optimizer.learning_rate is 0.0"),
        (["--optimizer.head_learning_rate=-1"], "optimizer.head_learning_rate is -1.0; it must be positive"),
        (["--optimizer.warmup=500"], "optimizer.warmup is 500.0; it must be a share of all steps, from 0 to 1"),
        (["--optimizer.warmup=0.7"], "optimizer.warmup = 0.7 and optimizer.hold = 0.4 are shares of all steps"),
        (["--optimizer.final_scale=-1"], "optimizer.final_scale is -1.0; it must be a share, from 0 to 1"),
        (["--optimizer.betas=[0.9,2]"], "optimizer.betas is [0.9, 2.0]; it must hold numbers that are at least 0 and"),
        (["--optimizer.max_gradient_norm=-1"], "optimizer.max_gradient_norm is -1.0; it must be at least 0"),
        (["--optimizer.spike_factor=-3"], "optimizer.spike_factor is -3.0; it must be more than 1, or 0"),
        (["--optimizer.max_skipped_steps=0"], "optimizer.max_skipped_steps is 0; it must be at least 1"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_values_that_would_train_nothing_or_fail_later_are_refused(refused, options, message):
    assert message in refused(*options)


def test_every_number_of_an_experiment_has_a_range():
    """But those of the mesh, which the devices decide, and of the sources of data."""
    valid = Experiment(DataSettings(DataSource("here")), "runs/none")
    for part in (None, "data", "model", "features", "optimizer"):
        settings = getattr(valid, part) if part else valid
        for field in dataclasses.fields(settings):
            kind = next((kind for kind in (int, float) if re.search(rf"\b{kind.__name__}\b", str(field.type))), None)
            if kind is None:
                continue
            value = (kind(-1e9), kind(-1e9)) if "tuple" in str(field.type) else kind(-1e9)
            changed = dataclasses.replace(settings, **{field.name: value}) if part else {field.name: value}
            with pytest.raises(ExperimentError, match=field.name):
                dataclasses.replace(valid, **({part: changed} if part else changed))


def test_schedules_without_a_hold_may_rise_for_long():
    data = DataSettings(DataSource("here"))
    Experiment(data, "runs/none", optimizer=OptimizerSettings(schedule="linear", warmup=0.9))
    Experiment(data, "runs/none", optimizer=OptimizerSettings(warmup=0.7, hold=0.3))


def test_missing_configuration_file_is_named(capfd):
    assert main(["train", "--config", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capfd.readouterr().err


def test_missing_data_is_named(refused, corpus):
    nowhere = corpus / "nowhere"
    assert str(nowhere) in refused(data={"train": {"path": str(nowhere)}})
    assert "'dev'" in refused(data={"train": {"path": str(corpus / "train.csv"), "split": "dev"}})


def test_missing_column_is_refused_with_the_nearest_name(refused, corpus):
    error = refused(data={"train": {"path": str(corpus), "text_column": "txt"}})
    assert "'txt'" in error and "did you mean 'text'?" in error


def test_empty_data_set_is_named(refused, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("audio,text\n")
    assert "empty.csv" in refused(data={"train": {"path": str(empty)}})


def test_audio_that_cannot_be_read_at_all_is_refused(refused, tmp_path):
    manifest = tmp_path / "gone.csv"
    manifest.write_text("audio,text\ngone.wav,ab\n")
    error = refused(data={"train": {"path": str(manifest)}})
    assert "none of the 1 audio files" in error and "gone.wav" in error


def test_characters_outside_the_vocabulary_are_listed(refused, tmp_path):
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6, "c": 7}))
    error = refused(f"--data.vocabulary={vocabulary}")
    assert "'d' (" in error and "data.vocabulary" in error


@pytest.fixture
def refused_stream(refused, corpus, tmp_path):
    """Runs ``train`` on two shards with changes to what a stream needs, and returns the one sentence."""
    shards = write_tar_shards(corpus, tmp_path / "shards", [3, 3])
    vocabulary = tmp_path / "vocab.json"
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcd"]
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))

    def run(*options: str, train: dict[str, object] | None = None, **data: object) -> str:
        source = {"path": str(shards), "streaming": True, "max_seconds": 1.0, **(train or {})}
        defaults = {"batch_seconds": 4.0, "batch_size": 8, "num_buckets": 1, "vocabulary": str(vocabulary)}
        return refused(*options, data={"train": source, **defaults, **data})

    return run


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocabulary": None}, "data.train.streaming: its characters are not known beforehand: set data.vocabulary"),
        ({"train": {"max_seconds": None}}, "not known beforehand: set data.train.max_seconds, or data.bucket_seconds"),
        ({"train": {"limit": 2}}, "leave out data.train.limit"),
        ({"train": {"text_column": "txt"}}, "has no column 'txt' but '__key__', 'audio', 'text'; did you mean 'text'?"),
        ({"cache_decoded_mb": 1}, "leave out data.cache_decoded_mb"),
        ({"stream_readers": 4}, "has 2 shard(s), fewer than data.stream_readers = 4"),
        ({"stream_readers": 16}, "data.batch_size = 8 is smaller than 16"),
        ({"shuffle_buffer": 3}, "data.shuffle_buffer = 3 with data.stream_readers = 1"),
        ({"bucket_seconds": [1.0, 0.5]}, "data.bucket_seconds is [1.0, 0.5]; it must be increasing"),
        ({"stream_readers": 0}, "data.stream_readers is 0"),
    ],
)
def test_streams_that_cannot_be_say_what_to_change(refused_stream, data, message):
    assert message in refused_stream(**data)


def test_characters_of_a_stream_may_be_those_of_a_pretrained_model_on_the_hub(tmp_path, monkeypatch):
    data = DataSettings(DataSource("here", streaming=True, max_seconds=1.0))
    streamed = Experiment(data, "runs/none", model=ModelSettings(pretrained="someone/model"))
    directory = hub_cache(tmp_path, "someone/model", monkeypatch)
    with pytest.raises(ExperimentError, match=r"characters are not known beforehand: set data\.vocabulary"):
        check_streamable(streamed)
    (directory / "vocab.json").write_text("{}")
    check_streamable(streamed)


def test_streams_know_no_other_task(refused_stream, refused, corpus):
    assert "task xvector" in refused_stream("--task=xvector")
    assert "train.csv cannot be streamed" in refused_stream(train={"path": str(corpus / "train.csv")})
    assert "set limit to a number of rows" in refused_stream(validation={"path": str(corpus), "streaming": True})


def test_characters_and_audio_of_the_first_streamed_rows_are_looked_at(refused_stream, tmp_path):
    assert "outside the vocabulary: 'C' (5)" in refused_stream(train={"case": "upper"})
    lines = tmp_path / "gone.jsonl"
    lines.write_text('{"audio": "gone.wav", "text": "ab"}\n')
    error = refused_stream(train={"path": str(lines)})
    assert "gone.jsonl cannot be read" in error and "no such file" in error


def test_memory_that_does_not_suffice_ends_in_what_makes_it_suffice(refused, monkeypatch):
    monkeypatch.setattr("speech_flax.training.loop.train", lambda _: jnp.zeros(2**50).block_until_ready())
    error = refused()
    assert all(name in error for name in ("data.batch_seconds", "accumulation", "model.remat", "RESOURCE_EXHAUSTED"))


def test_other_errors_of_a_device_are_not_explained_away(refused, monkeypatch):
    def fail(_: Experiment) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a collective was aborted")

    monkeypatch.setattr("speech_flax.training.loop.train", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        refused()


def test_mesh_that_does_not_fit_the_devices_says_what_to_change(refused):
    error = refused("--mesh.data=3")
    assert "data 3" in error and "1 device" in error and "-1" in error


def test_batch_smaller_than_its_micro_batches_is_refused(refused):
    assert "data.batch_size = 8 is smaller than 16" in refused("--accumulation=16")


@pytest.mark.parametrize(("accumulation", "says"), [(1, False), (8, True)])
def test_accumulation_that_enlarges_batches_says_so(corpus, accumulation, says):
    source = DataSource(str(corpus))
    split = open_split(
        source,
        DataSettings(source, batch_seconds=2.0, num_buckets=1),
        make_mesh(MeshSettings(), jax.devices()[:1]),
        accumulation=accumulation,
        seed=0,
        training=True,
        cache=None,
    )
    assert ("more than data.batch_seconds = 2" in split.plan.summary()) == says


def test_pretrained_directory_without_a_model_is_named(refused, tmp_path):
    (tmp_path / "pretrained").mkdir()
    assert "pretrained" in refused(model={"pretrained": str(tmp_path / "pretrained")})


def test_pretrained_model_of_another_family_is_refused(refused, tmp_path):
    directory = tmp_path / "hubert"
    directory.mkdir()
    HubertConfig(vocab_size=8).save_pretrained(directory)
    assert "hubert" in refused(model={"pretrained": str(directory)})


def test_transcripts_are_looked_at_as_the_tokenizer_takes_them_apart():
    """Vocabularies may have symbols of several characters; the blank is no transcript, even if it is spelled out."""
    symbols = ("<pad>", "<s>", "</s>", "<unk>", "|", "a", "tʃ", "<laugh>")
    tokenizer = Wav2Vec2CTCTokenizer({symbol: index for index, symbol in enumerate(symbols)})
    check_characters(tokenizer, ["a tʃa <laugh>", "a"])
    for text, unknown in (("a t", "'t'"), ("aʃ", "'ʃ'"), ("a <pad>", "'<pad>'"), ("<unk>", "'<unk>'")):
        with pytest.raises(ExperimentError, match=rf"outside the vocabulary: {unknown} \(1\), as in {text!r}"):
            check_characters(tokenizer, ["a", text])
    capitals = Wav2Vec2CTCTokenizer({"A": 0, "|": 1}, do_lower_case=True)
    check_characters(capitals, ["a a"])
    with pytest.raises(ExperimentError, match=r"outside the vocabulary: '\|' \(1\)"):
        check_characters(Wav2Vec2CTCTokenizer({"a": 0}), ["a a"])


def test_run_directory_of_another_experiment_is_refused(refused, corpus, tmp_path, capfd):
    directory = tmp_path / "run"
    (directory / "checkpoints" / "2").mkdir(parents=True)
    write_config(directory / "config.yaml", corpus, directory)
    assert "optimizer.learning_rate" in refused("--optimizer.learning_rate=1")


def test_start_that_came_to_no_checkpoint_does_not_hold_its_directory(corpus, tmp_path):
    directory = tmp_path / "run"
    run = RunDirectory(read_experiment(write_config(tmp_path / "first.yaml", corpus, directory)))
    run.open(read_experiment(tmp_path / "first.yaml"), {"utterances": "of that start"})
    other = read_experiment(write_config(tmp_path / "other.yaml", corpus, directory, optimizer={"learning_rate": 1e-4}))
    assert RunDirectory(other).plan() is None
    (directory / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ExperimentError, match=r"learning_rate"):
        RunDirectory(other)
    assert RunDirectory(read_experiment(tmp_path / "first.yaml")).plan() == {"utterances": "of that start"}


def test_resuming_what_is_no_run_is_refused(tmp_path, capfd):
    assert main(["train", "--resume", str(tmp_path)]) == 1
    assert "holds no run to resume" in capfd.readouterr().err


def test_resuming_with_another_configuration_is_refused(corpus, tmp_path, capfd):
    config = write_config(tmp_path / "config.yaml", corpus, tmp_path / "run")
    assert main(["train", f"--resume={tmp_path}", "--config", str(config)]) == 1
    assert "leave --config out" in capfd.readouterr().err


def test_processes_with_different_data_are_refused(monkeypatch):
    check_agreement("the settings", "alone")
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda digest: np.stack([digest, digest, digest ^ 1]))
    with pytest.raises(ValueError, match="the settings of process 2 differ from those of process 0"):
        check_agreement("the settings", "text")


def test_failure_of_one_process_ends_all(monkeypatch):
    assert together(lambda: 5) == 5
    told = []

    def everyone(own: str | None) -> list[str | None]:
        told.append(own)
        return [own, "no such file: b.csv"]

    monkeypatch.setattr("speech_flax.training.processes.exchange", everyone)
    with pytest.raises(ValueError, match=r"^process 1: no such file: b.csv$"):
        together(lambda: 5)

    def fails() -> None:
        raise FileNotFoundError("no such file: a.csv")

    with pytest.raises(FileNotFoundError, match=r"a\.csv"):
        together(fails)
    assert told == [None, "no such file: a.csv"]


def test_help_explains_every_option(capsys):
    assert main([]) == 2
    listed = re.findall(r"^  (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert set(listed) == {"train", "convert", "transcribe", "classify", "evaluate"}
    for command in listed:
        with contextlib.suppress(SystemExit):
            assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("usage:")
        options = re.findall(r"^  (?:-\w, )?(--[\w.]+)(.*(?:\n {6,}.*)*)", text, re.MULTILINE)
        explained = {name for name, rest in options if re.search(r"(  +|\n +)\S+ \S+", rest)}
        assert options and {name for name, _ in options} == explained
