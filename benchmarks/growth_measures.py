"""How the rows of ``growth.py`` are measured."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cpu_sides import Case

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "librispeech_100h_w2v_bert.yaml"
#: A process that takes longer is ended; its row says that it took too long.
LONGEST_SECONDS = 540

Row = dict[str, Any]
Measured = dict[str, Any]


def _side(case: Case, *options: str) -> Measured:
    """The answer of ``growth_sides.py``, or why there is none."""
    script = str(Path(__file__).parent / "growth_sides.py")
    command = [sys.executable, script, json.dumps(case._asdict()), *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {LONGEST_SECONDS} s"}
    if done.returncode:
        return {"error": f"ended by {done.returncode}: {done.stderr[-300:]}"}
    return json.loads(done.stdout)


def cpu_step(row: Row, *options: str) -> Measured:
    """One run on two threads: the fastest of a few."""
    return _side(Case(**row, threads=2), *options)


def cpu_attentions(row: Row) -> Measured:
    """As :func:`cpu_step`, with the library's attention and with the definition's."""
    return {"library": cpu_step(row), "plain": cpu_step(row, "--plain")}


def compile_on_cpu(row: Row) -> Measured:
    """A training step of w2v-bert-2.0's width, 10 s; nothing is run."""
    case = Case("training", "w2v-bert-2.0", row["layers"], threads=2)
    return _side(case, "--compile", *(["--unroll"] if row["stack"] == "unrolled" else []))


def _preflight(row: Row, **more: Any) -> Any:
    from speech_flax.training.experiment import read_experiment
    from speech_flax.training.preflight import preflight
    from speech_flax.training.tpu_slices import parse_slice

    slice_ = parse_slice(row["slice"])
    fsdp = 1 if row["mesh"] == "data" else min(slice_.num_chips, 16)
    rows = row["rows"] * slice_.num_chips
    settings = {
        "data.bucket_seconds": [row["seconds"]],
        "data.batch_seconds": rows * row["seconds"] + 0.01,
        "data.batch_size": rows,
        "data.train.max_seconds": row["seconds"],
        "mesh.data": -1,
        "mesh.fsdp": fsdp,
        "data.labels_per_second": 15,
        "model.remat": "full",  # rows of every size fit; the recipe's own setting is for its batch
        **more,
    }
    experiment = read_experiment(RECIPE, *(f"--{name}={value}" for name, value in settings.items()))
    changes = {"num_hidden_layers": row["layers"], "vocab_size": row["symbols"]}
    model = dataclasses.replace(experiment.model, config=experiment.model.config | changes)
    return preflight(dataclasses.replace(experiment, model=model), slice_)


def tpu_step(row: Row) -> Measured:
    """What the preflight says of the recipe's training step, quick bound."""
    report = _preflight(row)
    bucket = report.buckets[0]
    measured = {
        "peak_gib": bucket.memory.peak / 2**30,
        "usable_gib": bucket.memory.usable / 2**30,
        "parameters_gib": bucket.memory.parameters / 2**30,
        "optimizer_gib": bucket.memory.optimizer / 2**30,
        "compilation_s": bucket.compile_seconds,
    }
    if bucket.step_seconds is not None:
        measured |= {
            "step_s": bucket.step_seconds,
            "exposed_communication_s": bucket.exposed_communication_seconds,
            "audio_seconds_per_second_per_chip": bucket.audio_seconds_per_second_per_chip,
            "mfu": bucket.utilisation,
        }
    return {name: float(f"{value:.4g}") for name, value in measured.items()}


def compile_on_tpu(row: Row) -> Measured:
    """The recipe's step of 16 rows of 20.4 s per chip on v5e:4x4 until it is scheduled, with the start of a process."""
    unroll = row["layers"] if row["stack"] == "unrolled" else 1
    whole = {"slice": "v5e:4x4", "mesh": "fsdp", "seconds": 20.4, "rows": 16, "layers": row["layers"], "symbols": 32}
    report = _preflight(whole, **{"model.scan_unroll": unroll})
    return {"compilation_s": round(report.buckets[0].compile_seconds, 2)}


@functools.cache
def _program_cache() -> tempfile.TemporaryDirectory:
    """Empty at the first row of the first step, full at the second."""
    return tempfile.TemporaryDirectory(prefix="speech_flax_growth")


def first_step(row: Row) -> Measured:
    """The quickstart until it says how its first step went: seconds from the start of its process. With a warm cache
    the one in the middle of five starts."""
    cache = _program_cache().name
    if row["cache"] == "cold":
        return _quickstart(cache)
    if not any(Path(cache).iterdir()):
        _quickstart(cache)
    starts = [_quickstart(cache) for _ in range(5)]
    return sorted(starts, key=lambda start: start["first_step_s"])[2]


def _quickstart(cache: str) -> Measured:
    """Seconds from the start of the process until its first lines: of its data, of programs, of its first step."""
    with tempfile.TemporaryDirectory() as run:
        arguments = ["--config", "configs/quickstart.yaml", "--log_every", "1", "--run_directory", f"{run}/run"]
        command = [sys.executable, "train.py", *arguments, "--cache_directory", cache]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        times: dict[str, float] = {}
        starts = {"data_planned_s": "up to", "first_program_s": "compiled", "first_step_s": "step 1/"}
        for line in process.stdout:
            for name, start in starts.items():
                if line.strip().startswith(start) and name not in times:
                    times[name] = time.perf_counter() - began
            if "first_step_s" in times:
                break
        process.send_signal(signal.SIGTERM)
        process.communicate()
    return {name: round(value, 2) for name, value in times.items()}
