"""Interrupted runs: what goes on after a signal, or after a kill at any moment, is what would have gone on without."""

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tone_corpus import write_config, write_corpus

SCRIPT = Path(__file__).parent / "recorded_run.py"
STEPS = 40
EVERY = 4
STEP_SECONDS = 0.05
#: Compile faster, into a cache that all runs of this module share.
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


class Run:
    """One run directory, begun and continued by processes of its own."""

    def __init__(self, directory: Path, corpus: Path, cache: Path):
        self.directory = directory / "run"
        self.notes = directory / "notes.jsonl"
        self.config = write_config(
            directory / "config.yaml",
            corpus,
            self.directory,
            steps=STEPS,
            checkpoint_every=EVERY,
            keep_checkpoints=3,
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
        output, _ = process.communicate(timeout=300)
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

    def checksums(self) -> dict[str, int]:
        """Of every array of the last checkpoint: parameters, moments, counters."""
        record = self.directory / "checkpoints" / str(STEPS) / "record" / "metadata"
        return json.loads(record.read_text())["checksums"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A corpus and a cache of compiled programs."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": 20}), tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(places, tmp_path_factory) -> Run:
    """A run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("straight"), *places)
    run.finish()
    return run


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


def kill(run: Run, moment: str, generator: random.Random) -> str:
    """Start, kill at a moment of training, and say where it was."""
    before, process = len(run.noted()), run.start()
    wait_for(lambda: len(run.noted()) > before, process)
    if moment == "save":
        partial = lambda: list((run.directory / "checkpoints").glob("*tmp*"))  # noqa: E731
        wait_for(partial, process)
        time.sleep(generator.uniform(0, 0.02))
    else:
        time.sleep(generator.uniform(0, STEP_SECONDS * EVERY * 2))
    process.kill()
    process.communicate()
    left = [path.name for path in (run.directory / "checkpoints").glob("*tmp*")]
    return f"killed at step {run.noted()[-1][0]}, complete: {run.checkpoints()}, incomplete: {left}"


def drill(run: Run, moments: list[str], seed: int) -> list[str]:
    """Kill a run again and again; after each kill the next start must continue at the newest complete checkpoint."""
    generator, log = random.Random(seed), []
    for moment in moments:
        newest = run.checkpoints()[-1] if run.checkpoints() else 0
        before = len(run.noted())
        log.append(kill(run, moment, generator))
        assert run.noted()[before][0] == newest, log
    return log


def test_run_that_was_stopped_and_killed_ends_as_the_one_that_was_not(places, straight, tmp_path):
    run = Run(tmp_path, *places)
    process = run.start()
    wait_for(lambda: len(run.noted()) > 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped = run.noted()[-1][0] + 1
    assert 6 <= stopped < STEPS and stopped in run.checkpoints() and "--resume" in output
    drill(run, ["save", "step", "step"], seed=time.time_ns() % 1000)
    assert re.search(r"continuing at step \d+", run.finish())
    assert_as_straight(run, straight)
    logged = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == sorted({row["step"] for row in logged}), "each step is logged once"


@pytest.mark.slow
def test_twenty_kills_lose_nothing(places, straight, tmp_path):
    """The log of the drill is printed; ``pytest -m slow -s -k twenty``."""
    remaining, lines = 20, []
    for attempt in itertools.count():
        directory = tmp_path / str(attempt)
        directory.mkdir()
        run = Run(directory, *places)
        moments = ["save" if (remaining - index) % 3 == 0 else "step" for index in range(min(5, remaining))]
        lines += drill(run, moments, seed=attempt)
        remaining -= len(moments)
        run.finish()
        assert_as_straight(run, straight)
        lines.append("continued to the end: parameters, moments and utterances as without the kills")
        if remaining == 0:
            break
    print("\n" + "\n".join(lines))


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_a_checkpoint(places, straight, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    run = Run(tmp_path, *places)
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [run.start("--distributed=true", **names, JAX_PROCESS_ID=str(index)) for index in range(2)]
    wait_for(lambda: len(run.noted()) > 12, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    last = max(step for step, _ in run.noted()) + 1
    assert last < STEPS and run.checkpoints()[-1] == last
    assert "stopped" in outputs[0] and "stopped" not in outputs[1], "process 0 alone speaks"
