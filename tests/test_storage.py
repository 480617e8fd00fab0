"""Buckets: runs and models in them, against a server on this machine that stands in for Google Cloud Storage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket_server import bucket_server
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from streamed_corpus import write_parquet_shards
from tone_corpus import write_config, write_corpus

import speech_flax
from speech_flax import Wav2Vec2BertForCTC
from speech_flax.cli import main
from speech_flax.data.shards import open_shards
from speech_flax.data.sources import DataSource, open_source
from speech_flax.data.tables import SourceError
from speech_flax.storage import StorageError, exists, fetched, storage_path, written_locally
from speech_flax.training.checkpoints import Checkpoints
from speech_flax.training.experiment import ExperimentError, OptimizerSettings, read_experiment
from speech_flax.training.metrics_log import MetricsLog
from speech_flax.training.optimizer import Optimizer
from speech_flax.training.step import TrainState

SCRIPT = Path(__file__).parent / "recorded_run.py"
RUN = "gs://bucket/runs/first"
STEPS = 12


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """``gs://bucket``, for this process and those that it starts."""
    with bucket_server() as settings, pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def train(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), os.devnull, "0", *arguments]
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(bucket, tmp_path_factory):
    """A run in the bucket that goes on after its last checkpoint was made incomplete: first results, last words."""
    place = tmp_path_factory.mktemp("run")
    corpus = write_corpus(place / "corpus", {"train": 8, "test": 4})
    config = write_config(
        place / "config.yaml",
        corpus,
        Path("unused"),
        steps=STEPS,
        checkpoint_every=2,
        profile_steps=[8, 9],
        cache_directory=str(place / "cache"),
        data={"train": {"path": str(corpus)}, "test": {"path": str(corpus), "split": "test"}, "num_buckets": 1},
    )
    train("--config", str(config), "--run_directory", RUN)
    results = storage_path(RUN) / "results.json"
    before = results.read_text()
    results.unlink()
    (storage_path(RUN) / "checkpoints" / str(STEPS) / "commit_success.txt").unlink()  # as if it had been cut short
    return before, train("--resume", RUN)


@pytest.mark.slow
def test_run_in_a_bucket_is_continued_at_its_newest_complete_checkpoint(run):
    before, output = run
    assert f"continuing at step {STEPS - 2} from {RUN}" in output
    assert f"the checkpoint at step {STEPS} in {RUN}/checkpoints is incomplete and left out" in output
    again, first = json.loads((storage_path(RUN) / "results.json").read_text()), json.loads(before)
    assert again["steps"] == STEPS and again["test"] == first["test"] and again["test"]["utterances"] == 4


@pytest.mark.slow
def test_run_in_a_bucket_leaves_the_same_files(run):
    directory = storage_path(RUN)
    names = {path.name for path in directory.iterdir()}
    files = {"config.yaml", "environment.json", "plan.json", "results.json", "metrics.jsonl", "curves.png"}
    assert names == files | {"checkpoints", "model", "profile", "tensorboard"}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(2, STEPS + 1, 2), STEPS]
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (directory / "profile").glob("plugins/profile/*/*.xplane.pb")]
    assert all(path.stat().length > 0 for path in (directory / "tensorboard").iterdir())
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {str(STEPS - 2), str(STEPS)}


@pytest.mark.slow
def test_model_in_a_bucket_is_loaded(run):
    model, params = Wav2Vec2BertForCTC.from_pretrained(f"{RUN}/model")
    assert model.config.hidden_size == 16 and "lm_head" in params
    copy = fetched(f"{RUN}/model")
    assert fetched(f"{RUN}/model/") == copy and (copy / "vocab.json").is_file()
    (storage_path(RUN) / "model" / "vocab.json").write_text("{}")
    assert (fetched(f"{RUN}/model") / "vocab.json").read_text() == "{}", "what has changed is fetched anew"


def test_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, caplog):
    params = {"head": {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.zeros(8)}}
    state = TrainState.create(params, Optimizer(OptimizerSettings(), 10))
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    state = jax.device_put(state, place)
    directory = storage_path("gs://bucket/damaged")
    checkpoints = Checkpoints(directory)
    for step in (3, 7):
        checkpoints.save(state.replace(step=jax.device_put(jnp.int32(step), place)), {"seen": step})
    checkpoints.close()
    (directory / "7" / "record" / "metadata").write_text("{")
    checkpoints = Checkpoints(directory)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)
    restored, progress = checkpoints.restore_newest(abstract)
    checkpoints.close()
    assert progress == {"seen": 3} and int(restored.step) == 3
    np.testing.assert_array_equal(restored.params["head"]["kernel"], params["head"]["kernel"])
    assert "the checkpoint at step 7 in gs://bucket/damaged is damaged" in caplog.text
    assert {path.name for path in directory.iterdir()} == {"3", "7.damaged"}


def test_log_in_a_bucket_is_whole_at_every_checkpoint_and_goes_on_from_it(bucket):
    directory = storage_path("gs://bucket/log")
    log = MetricsLog(directory, 0)
    for step in (2, 4, 6):
        log.write(step, {"train/loss": 1.0 / step})
        if step == 4:
            log.flush()  # as before a checkpoint

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]

    assert steps() == [2, 4]
    log.close()
    assert steps() == [2, 4, 6]
    log = MetricsLog(directory, 4)
    log.write(8, {"train/loss": 0.5})
    log.close()
    assert steps() == [2, 4, 8]


def test_parquet_files_in_a_bucket_are_read_and_streamed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # "offline" is without buckets too
    corpus = write_corpus(tmp_path / "corpus", {"train": 7})
    local = write_parquet_shards(corpus, tmp_path / "shards", [4, 3])
    with written_locally(storage_path("gs://bucket/corpus")) as directory:
        shutil.copytree(local, directory, dirs_exist_ok=True)
    here, there = (open_source(DataSource(path)) for path in (str(local), "gs://bucket/corpus"))
    assert len(there) == 7 and list(there.texts()) == list(here.texts())
    assert there.durations().tolist() == here.durations().tolist()
    shards = open_shards("gs://bucket/corpus", "train")
    assert len(shards) == 2
    assert [row["text"] for _, row in shards.rows(1, first=1)] == list(here.texts())[5:]
    with pytest.raises(SourceError, match=r"no Parquet files test\*.parquet in gs://bucket/corpus"):
        open_source(DataSource("gs://bucket/corpus", split="test"))


def test_what_is_not_there_is_named(bucket, capsys):
    with pytest.raises(FileNotFoundError, match="no files in gs://bucket/nothing"):
        speech_flax.AutoModel.from_pretrained("gs://bucket/nothing")
    assert main(["train", "--resume", "gs://bucket/nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: gs://bucket/nothing holds no run to resume")


def test_bucket_that_cannot_be_read_is_named(bucket):
    with pytest.raises(StorageError, match=r"gs://forbidden/runs cannot be reached .*; check the name"):
        exists(storage_path("gs://forbidden/runs"))


def test_bucket_without_its_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert storage_path(tmp_path) == tmp_path
    with pytest.raises(StorageError, match=r"needs the package gcsfs: pip install 'speech_flax\[gcs\]'"):
        storage_path("gs://bucket/runs")


def test_files_written_aside_go_to_the_bucket_and_to_a_directory(bucket, tmp_path):
    for target in (storage_path("gs://bucket/written"), tmp_path):
        with written_locally(target) as directory:
            (directory / "deep").mkdir()
            (directory / "deep" / "file").write_bytes(b"content")
        assert (target / "deep" / "file").read_bytes() == b"content"


def test_cache_in_a_bucket_is_refused(tmp_path):
    config = write_config(tmp_path / "config.yaml", tmp_path, tmp_path, cache_directory="gs://bucket/cache")
    with pytest.raises(ExperimentError, match="cache_directory is gs://bucket/cache; it must be a directory of this"):
        read_experiment(config)
