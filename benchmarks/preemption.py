"""How long a run of a full-size model takes from SIGTERM to its end, with everything saved.

    python benchmarks/preemption.py [--models w2v-bert-2.0 hubert-large]

Trains each model from random weights on the CPU, one short utterance per step, in float32 with AdamW; sends SIGTERM in
the middle of a step, and measures when the checkpoint is complete and when the process has ended. The disk is that of
the directory for temporary files (TMPDIR). The larger model takes about 17 GB of memory.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS_BEFORE = 4
POLL_SECONDS = 0.02
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LARGE |= {"apply_spec_augment": False, "layerdrop": 0.0}
MODELS = {
    "w2v-bert-2.0": ("wav2vec2-bert", LARGE),
    "hubert-large": (
        "hubert",
        LARGE | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    ),
}


def command(model: str, run: Path) -> list[str]:
    """The quickstart with another model, one utterance per step, and no checkpoint but the last."""
    family, config = MODELS[model]
    options = {
        "run_directory": run,
        "cache_directory": "null",
        "model.family": family,
        "model.config": json.dumps(config),
        "model.scan_unroll": 1,
        "data.batch_seconds": 4,
        "data.batch_size": 1,
        "data.num_buckets": 1,
        "data.validation": "null",
        "data.test": "null",
        "log_every": 1,
        "checkpoint_every": 100_000,
    }
    fixed = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "train.py", "--config", "configs/quickstart.yaml", *fixed]


def logged_steps(run: Path) -> list[float]:
    """Seconds of every step so far."""
    log = run / "metrics.jsonl"
    return [json.loads(line)["speed/seconds"] for line in log.read_text().splitlines()] if log.exists() else []


def measure(model: str, directory: Path) -> list[str]:
    """One row of the table.

    Raises:
        RuntimeError: when the run does not end as it should.
    """
    run = directory / "run"
    with (directory / "output.txt").open("w") as output:
        process = subprocess.Popen(command(model, run), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and len(logged_steps(run)) < STEPS_BEFORE:
                time.sleep(POLL_SECONDS)
            process.send_signal(signal.SIGTERM)
            signalled, writing, complete = time.monotonic(), None, None
            while process.poll() is None:
                names = [path.name for path in (run / "checkpoints").iterdir()]
                now = time.monotonic() - signalled
                writing = writing or (now if any("tmp" in name for name in names) else None)
                complete = complete or (now if any(name.isdigit() for name in names) else None)
                time.sleep(POLL_SECONDS)
            ended = time.monotonic() - signalled
        finally:
            process.kill()
    if process.returncode or writing is None or complete is None:
        raise RuntimeError((directory / "output.txt").read_text()[-1000:])
    size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    began = time.monotonic()
    os.sync()
    synced = time.monotonic() - began
    step = logged_steps(run)[STEPS_BEFORE - 1]
    return [model, f"{size / 1e9:.1f}", *(f"{value:.1f}" for value in (step, writing, complete, ended, synced))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    print("Seconds from SIGTERM\n")
    header = ("model", "GB on disk", "a step", "begins to write", "complete", "process ended", "and disk synced")
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for model in options.models:
        with tempfile.TemporaryDirectory() as directory:
            print(f"| {' | '.join(measure(model, Path(directory)))} |", flush=True)


if __name__ == "__main__":
    main()
