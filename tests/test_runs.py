"""Whole runs by the real command: what they leave behind, and that interruptions make no difference to it."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tone_corpus import write_config, write_corpus

from speech_flax.cli import main
from speech_flax.training.experiment import read_experiment

SCRIPT = Path(__file__).parent / "recorded_run.py"
STEPS = 60
EVERY = 4
STEP_SECONDS = 0.05
#: Most seconds from the start of a process to a kill.
START_SECONDS = 12.0
#: Most files that a save may have written when it is killed, of the 13 or more that it writes.
SAVE_FILES = 10
#: Of the moments at which the twenty kills fall.
SEED = 5
#: One of the twenty audio files cannot be read.
DATA = {"batch_seconds": 4.0, "batch_size": 8, "num_buckets": 1, "max_bad_fraction": 0.2}
BAD_FILE = "train-007.wav"
#: A hang is one; seconds that no machine needs, however busy.
PATIENCE = 1200
#: Compile faster, into a cache that all runs of this module share.
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


class Run:
    """One run directory, begun and continued by processes of its own."""

    def __init__(self, directory: Path, corpus: Path, cache: Path, **data: object):
        self.directory = directory / "run"
        self.notes = directory / "notes.jsonl"
        self.config = write_config(
            directory / "config.yaml",
            corpus,
            self.directory,
            steps=STEPS,
            checkpoint_every=EVERY,
            keep_checkpoints=3,
            profile_steps=[6, 7],
            data={**DATA, "train": {"path": str(corpus)}, **data},
            cache_directory=str(cache),
        )

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Begin the run, or continue it if it was begun."""
        how = ["--resume", str(self.directory)] if (self.directory / "config.yaml").exists() else []
        how = how or ["--config", str(self.config), *arguments]
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self.notes), str(STEP_SECONDS), *how],
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        return output

    def noted(self) -> list[tuple[int, list[str]]]:
        """(step, ids) of every step that was begun, in order."""
        if not self.notes.exists():
            return []
        *lines, _ = self.notes.read_text().split("\n")
        return [tuple(json.loads(line)) for line in lines]

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints."""
        directory = self.directory / "checkpoints"
        return (
            sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit()) if directory.exists() else []
        )

    def incomplete(self) -> list[str]:
        """Checkpoints that were being written, or are."""
        return sorted(path.name for path in (self.directory / "checkpoints").glob("*tmp*"))

    def is_saving(self, files: int) -> bool:
        """Whether a checkpoint is being written of which ``files`` files are there."""
        directory = self.directory / "checkpoints"
        written = [sum(len(names) for *_, names in os.walk(directory / name)) for name in self.incomplete()]
        return any(count >= files for count in written)

    def checksums(self) -> dict[str, int]:
        """Of every array of the last checkpoint: parameters, moments, counters."""
        record = self.directory / "checkpoints" / str(STEPS) / "record" / "metadata"
        return json.loads(record.read_text())["checksums"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus and a cache of compiled programs."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 20})
    (corpus / BAD_FILE).write_bytes(b"RIFF, but no audio")
    return corpus, tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(places, tmp_path_factory) -> Run:
    """A run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("straight"), *places)
    run.finish()
    return run


def test_run_directory_holds_what_describes_the_run(straight, places):
    directory, (_, cache) = straight.directory, places
    resolved = read_experiment(directory / "config.yaml")
    assert resolved == read_experiment(straight.config)
    environment = json.loads((directory / "environment.json").read_text())
    assert {"git_commit", "libraries", "devices", "command"} <= set(environment) and environment["libraries"]["jax"]
    results = json.loads((directory / "results.json").read_text())
    assert results["steps"] == STEPS and results["train_seconds"] > STEPS * STEP_SECONDS and 0 < results["goodput"] < 1
    (bad_file,) = results["bad_files"]
    assert BAD_FILE in bad_file
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (directory / "model").iterdir()} >= {"config.json", "model.safetensors", "vocab.json"}
    assert list((directory / "profile").rglob("*.xplane.pb")), "a trace of the steps asked for"
    assert list((directory / "tensorboard").iterdir())
    assert straight.checkpoints() == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
    assert list((cache / "programs").iterdir()) and list((cache / "durations").iterdir())
    assert not list(directory.rglob("*.partial"))


def test_too_many_bad_files_stop_a_run(places, straight, tmp_path):
    run = Run(tmp_path, *places, max_bad_fraction=0.01)
    process = run.start()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search(
        rf"error: \d of \d+ audio files cannot be read, .*data.max_bad_fraction = 0.01.*{BAD_FILE}", output
    )
    assert not (run.directory / "results.json").exists()


def test_log_has_a_line_of_numbers_at_every_interval(straight):
    rows = [json.loads(line) for line in (straight.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    for row in rows:
        assert row["train/loss"] > 0 and row["train/gradient_norm"] > 0 and row["train/learning_rate"] > 0
        assert 0 <= row["speed/padding"] < 1 and row["speed/audio_seconds_per_second"] > 0
        assert 0 <= row["speed/seconds_waiting_for_data"] <= row["speed/seconds"]
        assert "speed/device_memory_gib" in row and 0 < row["speed/goodput"] < 1
    assert rows[-1]["speed/remaining_seconds"] == 0 < rows[0]["speed/remaining_seconds"]


def test_finished_run_is_not_done_again(straight, capsys):
    before = (straight.directory / "results.json").stat().st_mtime_ns
    assert main(["train", "--resume", str(straight.directory)]) == 0
    assert "finished run" in capsys.readouterr().out
    assert (straight.directory / "results.json").stat().st_mtime_ns == before


def test_checkpoint_of_another_model_is_refused(straight, tmp_path, capfd):
    directory = tmp_path / "run"
    shutil.copytree(straight.directory, directory)
    (directory / "results.json").unlink()
    changed = (directory / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: 8")
    (directory / "config.yaml").write_text(changed.replace(str(straight.directory), str(directory)))
    assert main(["train", "--resume", str(directory)]) == 1
    error = capfd.readouterr().err
    assert "belongs to another model" in error and error.count("\n") == 1
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["52", "56", "60"]


def test_data_that_changed_under_a_run_are_refused(straight, places, tmp_path, capfd):
    corpus, directory = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(places[0], corpus)
    shutil.copytree(straight.directory, directory)
    (directory / "results.json").unlink()
    config = (directory / "config.yaml").read_text().replace(str(places[0]), str(corpus))
    (directory / "config.yaml").write_text(config.replace(str(straight.directory), str(directory)))
    rows = (corpus / "train.csv").read_text().splitlines()
    (corpus / "train.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert main(["train", "--resume", str(directory)]) == 1
    assert "has changed since this run was begun (20 utterances then, 19 now)" in capfd.readouterr().err


def test_evaluation_command_scores_the_model_of_a_run(straight, places):
    model = str(straight.directory / "model")
    data = [f"--data.test={{path: {places[0]}, split: train}}", "--split=test"]
    command = [sys.executable, "-m", "speech_flax.cli", "evaluate", "--config", str(straight.config), "--model", model]
    done = subprocess.run([*command, *data], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["utterances"] == 19 and numbers["bad_files"] == 1 and numbers["wer"] > 0 and numbers["loss"] > 0


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def assert_as_straight(run: Run, straight: Run) -> None:
    expected = dict(straight.noted())
    assert sorted(expected) == list(range(STEPS)) and len({tuple(ids) for ids in expected.values()}) > 10
    steps = [step for step, _ in run.noted()]
    assert set(steps) == set(expected) and all(ids == expected[step] for step, ids in run.noted())
    assert run.checksums() == straight.checksums() and len(run.checksums()) > 100
    for name in ("results.json", "model/model.safetensors"):
        assert (run.directory / name).exists()
    ours, theirs = ((path.directory / "model/model.safetensors").read_bytes() for path in (run, straight))
    assert ours == theirs


@dataclasses.dataclass(frozen=True)
class Kill:
    """What a kill found and left on disk."""

    moment: str
    resumed: int | None
    step: int
    complete: list[int]
    incomplete: list[str]

    def __str__(self) -> str:
        began = "killed before its first step" if self.resumed is None else f"went on at step {self.resumed}"
        kept, cut = self.complete or "none", ", ".join(self.incomplete) or "none"
        return f"{began}; killed ({self.moment}) at step {self.step}; complete: {kept}; cut short: {cut}"


def kill(run: Run, moment: str, generator: random.Random) -> Kill:
    """Start a run, let it get on, and kill it: while it starts, anywhere between steps, or during a save."""
    left = STEPS - (run.checkpoints() or [0])[-1]
    before, process = len(run.noted()), run.start()
    if moment == "start":
        end = time.monotonic() + generator.uniform(0, START_SECONDS)
        wait_for(lambda: time.monotonic() > end or len(run.noted()) > before, process)
    else:
        steps = generator.randint(2, max(2, min(3 * EVERY, left - 3 * EVERY)))  # the run is not to end before
        wait_for(lambda: len(run.noted()) >= before + steps, process)
        if moment == "save":
            files = generator.randint(0, SAVE_FILES)
            wait_for(lambda: run.is_saving(files), process)
        else:
            time.sleep(generator.uniform(0, STEP_SECONDS))
    process.kill()
    process.communicate()
    noted = run.noted()
    resumed = noted[before][0] if len(noted) > before else None
    return Kill(moment, resumed, noted[-1][0] + 1 if noted else 0, run.checkpoints(), run.incomplete())


def drill(run: Run, moments: list[str], seed: int) -> list[Kill]:
    """Kill a run again and again; each start must go on at the newest complete checkpoint there is."""
    generator, kills = random.Random(seed), []
    for moment in moments:
        newest = run.checkpoints()[-1] if run.checkpoints() else 0
        kills.append(kill(run, moment, generator))
        assert kills[-1].resumed in (newest, None), kills
        assert run.checkpoints() == kills[-1].complete and (kills[-1].complete or [0])[-1] >= newest, kills
    return kills


def finish_after(run: Run, kills: list[Kill]) -> str:
    """Run to the end; what it says."""
    before, newest = len(run.noted()), (kills[-1].complete or [0])[-1]
    output = run.finish()
    assert run.noted()[before][0] == newest, kills
    return output


def test_run_that_was_stopped_and_killed_ends_as_the_one_that_was_not(places, straight, tmp_path):
    run = Run(tmp_path, *places)
    process = run.start()
    wait_for(lambda: len(run.noted()) > 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    stopped = run.noted()[-1][0] + 1
    assert 6 <= stopped < STEPS and stopped in run.checkpoints() and "--resume" in output
    kills = drill(run, ["save", "step", "step"], seed=time.time_ns() % 1000)
    assert f"continuing at step {kills[-1].complete[-1]} " in finish_after(run, kills)
    assert_as_straight(run, straight)
    logged = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == sorted({row["step"] for row in logged}), "each step is logged once"


@pytest.mark.slow
def test_twenty_kills_lose_nothing(places, straight, tmp_path):
    """Five runs of four kills each, and then to their end; ``pytest -n 0 -m slow -s -k twenty`` shows what happened."""
    generator, every = random.Random(SEED), []
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        run = Run(directory, *places)
        moments = ["step", "save", *generator.sample(("start", "step", "save"), 2)]
        generator.shuffle(moments)
        kills = drill(run, moments, seed=generator.randrange(2**32))
        print(f"run {attempt + 1}", *kills, sep="\n  ")
        finish_after(run, kills)
        assert_as_straight(run, straight)
        print("  went on to the end: parameters, moments and utterances as without the kills, bit for bit")
        every += kills
    assert len(every) == 20
    continued = [one for one in every if one.resumed]
    assert len(continued) >= 8, "kills of what went on from a checkpoint"
    assert sum(bool(one.incomplete) for one in continued) >= 3, "among them kills during a save"


def start_two(run: Run) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [run.start(**names, JAX_PROCESS_ID=str(index)) for index in range(2)]


@pytest.mark.slow
def test_two_processes_stop_together_and_finish_together(places, tmp_path):
    run = Run(tmp_path, *places, test={"path": str(places[0])})
    processes = start_two(run)
    wait_for(lambda: len(run.noted()) > 12, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    last = max(step for step, _ in run.noted()) + 1
    assert last < STEPS and run.checkpoints()[-1] == last
    assert "stopped" in outputs[0] and "stopped" not in outputs[1], "process 0 alone speaks"

    processes = start_two(run)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"continuing at step {last}" in outputs[0] and "step" not in outputs[1]
    results = json.loads((run.directory / "results.json").read_text())
    assert results["steps"] == STEPS and results["test"]["utterances"] == 19
    assert (run.directory / "model" / "model.safetensors").exists()
    seen = {step: set() for step in range(STEPS)}
    for step, ids in run.noted():
        seen[step] |= set(filter(None, ids))
    assert all(seen.values()) and len(set.union(*seen.values())) == 20
