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

from speech_flax.storage import AnyPath, exists, storage_path
from speech_flax.training.experiment import Experiment, ExperimentError, differences, experiment_yaml, read_experiment

_LIBRARIES = ("speech_flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "grain")
#: Fields that may change when an unfinished run is continued.
_FREE = ("run_directory", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_every")
_FREE += ("cache_directory", "hang_minutes", "profile_steps", "wandb_project", "distributed")
_FREE += ("mesh.data", "mesh.fsdp", "mesh.tensor", "data.num_workers", "data.cache_decoded_mb", "accumulation")
_FREE += ("data.trials", "model.remat", "model.scan_unroll", "data.max_bad_fraction", "optimizer.max_skipped_steps")


class RunDirectory:
    """Files of a run, on this machine or in a bucket (``gs://``). Only process 0 writes."""

    def __init__(self, experiment: Experiment):
        self.path = storage_path(experiment.run_directory)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.results = self.path / "results.json"
        self.curves = self.path / "curves.png"
        self.metrics = self.path / "metrics.jsonl"
        self.profile = self.path / "profile"
        self.config = self.path / "config.yaml"
        self._plan = self.path / "plan.json"
        self._check_same(experiment)

    def _check_same(self, experiment: Experiment) -> None:
        """Refuse to mix two experiments in one directory; one that never came to a checkpoint left nothing to mix."""
        if not (exists(self.config) and self._has_checkpoint()):
            return
        changed = [name for name in differences(read_experiment(self.config), experiment) if name not in _FREE]
        if changed:
            raise ExperimentError(
                f"{self.path} holds a run of another experiment (it differs in {', '.join(changed)}); choose another "
                "run_directory, or delete that one"
            )

    def _has_checkpoint(self) -> bool:
        return exists(self.checkpoints) and any(path.name.isdigit() for path in self.checkpoints.iterdir())

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that has come to its end, or ``None``."""
        return json.loads(self.results.read_text()) if exists(self.results) else None

    def plan(self) -> dict[str, Any] | None:
        """How the training utterances of an unfinished run are batched; see :meth:`Split.plan_record`."""
        return json.loads(self._plan.read_text()) if exists(self._plan) and self._has_checkpoint() else None

    def open(self, experiment: Experiment, plan: dict[str, Any]) -> None:
        """Create the directory and describe the run in it. The configuration comes last: with it, all is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _write(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
            _write(self._plan, json.dumps(plan) + "\n")
            _write(self.config, experiment_yaml(experiment))

    def write_results(self, results: dict[str, Any]) -> None:
        """Write ``results.json``."""
        if jax.process_index() == 0:
            _write(self.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _write(path: AnyPath, text: str) -> None:
    """A file that appears whole or not at all; in a bucket, all do."""
    if not isinstance(path, Path):
        path.write_text(text)
        return
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text)
    aside.replace(path)


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
