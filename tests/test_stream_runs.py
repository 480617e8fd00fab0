"""Runs on streams by the real command: what is killed goes on with the utterances that would have come."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from streamed_corpus import write_tar_shards
from tone_corpus import TONES, write_config, write_corpus

from speech_flax.cli import main

SCRIPT = Path(__file__).parent / "recorded_run.py"
STEPS = 16
#: A hang is one; seconds that no machine needs, however busy.
PATIENCE = 1200


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """Six shards, and a cache of compiled programs."""
    directory = tmp_path_factory.mktemp("stream")
    files = write_corpus(directory / "files", {"train": 24})
    return write_tar_shards(files, directory / "shards", [5, 4, 3, 6, 2, 4]), directory / "cache"


class Run:
    """One run directory, begun and continued by processes of its own."""

    def __init__(self, directory: Path, shards: Path, cache: Path):
        directory.mkdir(exist_ok=True)
        self.directory, self.notes = directory / "run", directory / "notes.jsonl"
        vocabulary = directory / "vocab.json"
        vocabulary.write_text(json.dumps({t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *TONES])}))
        data = {"train": {"path": str(shards), "streaming": True}, "vocabulary": str(vocabulary)}
        data |= {"bucket_seconds": [0.5, 1.2], "batch_seconds": 2.0, "shuffle_buffer": 8, "stream_readers": 2}
        self.config = write_config(
            directory / "config.yaml",
            shards,
            self.directory,
            steps=STEPS,
            checkpoint_every=3,
            data=data,
            cache_directory=str(cache),
        )

    def start(self, **environment: str) -> subprocess.Popen:
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        known = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        how = ["--resume", str(self.directory)] if (self.directory / "config.yaml").exists() else []
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self.notes), "0.1", *(how or ["--config", str(self.config)])],
            env={**os.environ, **known, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def noted(self) -> list[tuple[int, list[str]]]:
        """(step, ids) of every step that was begun, in order."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    def checksums(self) -> dict[str, int]:
        """Of every array of the last checkpoint."""
        record = self.directory / "checkpoints" / str(STEPS) / "record" / "metadata"
        return json.loads(record.read_text())["checksums"]


def finish(*processes: subprocess.Popen) -> list[str]:
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.fixture(scope="module")
def straight(places, tmp_path_factory) -> Run:
    """A run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("straight"), *places)
    (output,) = finish(run.start())
    for shape in ("4 x 0.5 s", "2 x 1.2 s"):
        assert f"compiled training on {shape}" in output, "any shape may come next: all are compiled"
    return run


def test_killed_run_goes_on_with_the_utterances_that_would_have_come(places, straight, tmp_path):
    run = Run(tmp_path, *places)
    process = run.start()
    while not any(step >= 8 for step, _ in run.noted()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(run.noted())
    (output,) = finish(run.start())
    begun = int(re.search(r"continuing at step (\d+)", output)[1])
    assert begun in (3, 6, 9) and run.noted()[before][0] == begun
    expected = dict(straight.noted())
    assert sorted(expected) == list(range(STEPS)) and all(ids == expected[step] for step, ids in run.noted())
    assert run.checksums() == straight.checksums()
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert 0 <= row["speed/padding"] < 1 and row["speed/audio_seconds_per_second"] > 0
        assert 0 <= row["speed/seconds_waiting_for_data"] <= row["speed/seconds"]
    assert rows[-1]["speed/remaining_seconds"] == 0 < rows[0]["speed/remaining_seconds"]


def test_shards_that_changed_under_a_run_are_refused(straight, tmp_path, capfd):
    directory, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(straight.directory, directory)
    (directory / "results.json").unlink()
    config = yaml.safe_load((directory / "config.yaml").read_text())
    shutil.copytree(config["data"]["train"]["path"], shards)
    (shards / "train-005.tar").unlink()
    config["data"]["train"]["path"], config["run_directory"] = str(shards), str(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--resume", str(directory)]) == 1
    assert "has changed since this run was begun (6 shards then, 5 now)" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_train_on_the_batches_of_one(places, straight, tmp_path):
    run = Run(tmp_path, *places)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    finish(*(run.start(**names, JAX_PROCESS_ID=str(index)) for index in range(2)))
    both: dict[int, set[str]] = {}
    for step, ids in run.noted():
        both.setdefault(step, set()).update(ids)
    assert both == {step: set(ids) for step, ids in straight.noted()}
