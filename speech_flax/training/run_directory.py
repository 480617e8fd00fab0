"""The directory of one run: its configuration, environment, logs, results and pictures."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from speech_flax.training.experiment import Experiment, ExperimentError, differences, read_experiment, write_experiment

_LIBRARIES = ("speech_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "grain")
#: Fields that may change when an unfinished run is continued.
_FREE = ("run_directory", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_every")
_FREE += ("cache_directory", "hang_minutes", "profile_steps", "wandb_project", "distributed")
_FREE += ("mesh.data", "mesh.fsdp", "mesh.tensor", "data.num_workers", "data.cache_decoded_mb", "accumulation")
_FREE += ("model.remat", "model.scan_unroll", "data.max_bad_fraction", "optimizer.max_skipped_steps")


class RunDirectory:
    """Files of a run. Only process 0 writes."""

    def __init__(self, experiment: Experiment):
        self.path = Path(experiment.run_directory)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.results = self.path / "results.json"
        self.curves = self.path / "curves.png"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / "config.yaml"
        self._check_same(experiment)

    def _check_same(self, experiment: Experiment) -> None:
        """Refuse to mix two experiments in one directory."""
        if not self.config.exists():
            return
        changed = [name for name in differences(read_experiment(self.config), experiment) if name not in _FREE]
        if changed:
            raise ExperimentError(
                f"{self.path} holds a run of another experiment (it differs in {', '.join(changed)}); choose another "
                "run_directory, or delete that one"
            )

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that has come to its end, or ``None``."""
        return json.loads(self.results.read_text()) if self.results.exists() else None

    def open(self, experiment: Experiment) -> None:
        """Create the directory and describe the run in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_experiment(experiment, self.config)
            (self.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")

    def write_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json``; it appears whole or not at all."""
        if jax.process_index() == 0:
            aside = self.results.with_suffix(".json.partial")
            aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
            aside.replace(self.results)


def environment() -> dict[str, Any]:
    """What a run depends on beside its configuration: commit, versions, devices, command."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "libraries": versions,
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class MetricsLog:
    """One JSON object per line in ``metrics.jsonl``, and the same numbers for TensorBoard.

    Lines of steps after ``first_step`` are dropped when a run goes on from an earlier checkpoint: the log reads as if
    the run had never been interrupted.
    """

    def __init__(self, run: RunDirectory, first_step: int):
        from tensorboardX import SummaryWriter

        self._path = run.metrics
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
            self._path.write_text("".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append ``values`` of ``step``; keys are ``train/loss`` and the like."""
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
