"""Training steps and forward passes on one GPU: speech_flax against Transformers in PyTorch, both in one run.

    PYTHONPATH=. python benchmarks/gpu.py --results gpu.json [--models hubert-large] [--seconds 20] [--modes training]
    PYTHONPATH=. python benchmarks/gpu.py --results gpu.json --longest

Needs jax with CUDA, flax, optax, torch and transformers; speech_flax comes from the checkout. Each measurement is a
process of its own, so that no side holds the other's memory. What is in the file of results is not measured again: a
run that was cut off goes on where it was, and models or lengths can be measured one call after the other.

Each side is measured with all its settings and the best counts. A batch holds ``--audio`` seconds in all, halved until
it fits. ``--longest`` finds the longest single utterance that can be trained on, by bisection. ``--device cpu --size
tiny`` tries the plumbing on any machine.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_sides import Measurement

SIDES = ("speech_flax", "torch")
MODELS = ("w2v-bert-2.0", "hubert-large")
MODES = ("training", "forward")
#: Operations per second of dense bfloat16 products, from NVIDIA's data sheets (SXM; half of the figures with sparsity).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
#: Lengths for --longest: starts, and stops when known to a tenth.
_FIRST_SECONDS, _LAST_SECONDS = 60.0, 14_400.0


def settings_of(side: str, model: str, mode: str) -> list[dict]:
    """All that a user of this side could choose from, the likely best first."""
    if side == "speech_flax":
        return [{"remat": remat} for remat in (("none", "dots", "full") if mode == "training" else ("none",))]
    # Transformers has no scaled_dot_product_attention for the relative keys of Wav2Vec2-BERT.
    attention = ("sdpa", "eager") if model == "hubert-large" else ("eager",)
    checkpointing = (False, True) if mode == "training" else (False,)
    return [
        {"attention": kind, "compile": compiled, "checkpointing": saved}
        for kind in attention
        for compiled in (True, False)
        for saved in checkpointing
    ]


class Runs:
    """Measurements by their description, kept in a file after every one."""

    def __init__(self, path: Path, limit: float, deadline: float):
        self._path, self._limit, self._deadline = path, limit, deadline
        self._results = json.loads(path.read_text()) if path.exists() else {}

    def run(self, what: Measurement) -> dict:
        name = json.dumps(dataclasses.asdict(what), sort_keys=True)
        if name not in self._results:
            remaining = self._deadline - time.monotonic()
            if remaining < 30:
                raise TimeoutError
            self._results[name] = self._measure(what, min(self._limit, remaining))
            self._path.write_text(json.dumps(self._results, indent=1) + "\n")
        return self._results[name]

    def _measure(self, what: Measurement, limit: float) -> dict:
        label = f"{what.side} {what.model} {what.mode} {what.seconds:g} s x {what.batch} {what.settings}"
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if what.device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(Path(__file__).with_name("gpu_sides.py")), json.dumps(dataclasses.asdict(what))]
        start = time.monotonic()
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
            last = (done.stdout.strip().splitlines() or [""])[-1]
            if last.startswith("{"):
                result = json.loads(last)
            else:  # a process that died has no more to say; without memory the system kills it
                result = {"error": "out of memory" if done.returncode == -9 else done.stderr.strip()[-300:]}
        except subprocess.TimeoutExpired:
            result = {"error": f"took longer than {limit:.0f} s"}
        said = result.get("error") or f"{result['step'] * 1000:.1f} ms, {result['peak_memory'] / 2**30:.1f} GiB"
        print(f"{label}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        return result


def fitting(runs: Runs, what: Measurement) -> tuple[Measurement, dict]:
    """``what`` with the largest batch that fits, of those that come from halving it."""
    result = runs.run(what)
    while result.get("error") == "out of memory" and what.batch > 1:
        what = dataclasses.replace(what, batch=what.batch // 2)
        result = runs.run(what)
    return what, result


def best(runs: Runs, what: Measurement) -> tuple[Measurement, dict] | None:
    """The fastest of all settings of a side, by seconds of audio per second."""
    found = []
    for settings in settings_of(what.side, what.model, what.mode):
        fitted, result = fitting(runs, dataclasses.replace(what, settings=settings))
        if "step" in result:
            found.append((speed(fitted, result), fitted, result))
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def speed(what: Measurement, result: dict) -> float:
    """Seconds of audio per second."""
    return what.batch * what.seconds / result["step"]


def longest(runs: Runs, what: Measurement) -> float:
    """Seconds of the longest utterance that fits, to a tenth, with the settings that need least memory; 0 if none."""
    settings = {"remat": "full"}
    if what.side == "torch":
        kind = "sdpa" if what.model == "hubert-large" else "eager"
        settings = {"attention": kind, "compile": False, "checkpointing": True}
    what = dataclasses.replace(what, batch=1, settings=settings, patience=0.0)

    def fits(seconds: float) -> bool:
        return "step" in runs.run(dataclasses.replace(what, seconds=seconds))

    low, high = 0.0, _FIRST_SECONDS
    while high <= _LAST_SECONDS and fits(high):
        low, high = high, 2 * high
    while low and high - low > low / 10 and high <= _LAST_SECONDS:
        middle = round((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def peak_of(device: str) -> float | None:
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def row_of(runs: Runs, what: Measurement, sides: list[str]) -> str:
    """A line of the table: both sides, and how many times faster speech_flax is."""
    cells, speeds, flops = [what.model, what.mode, f"{what.seconds:g} s"], {}, None
    for side in sides:
        chosen = best(runs, dataclasses.replace(what, side=side))
        if chosen is None:
            cells += ["-"] * 5
            continue
        fitted, result = chosen
        speeds[side] = speed(fitted, result)
        # Both do the operations that speech_flax counts, which are those of the formulas.
        flops = result["flops"] / fitted.batch if "flops" in result else flops
        peak = peak_of(result["device"])
        used = f"{flops * fitted.batch / result['step'] / peak:.2f}" if flops and peak else "-"
        named = ", ".join(f"{name} {value}" for name, value in fitted.settings.items())
        cells += [str(fitted.batch), f"{speeds[side]:.0f}", used, f"{result['peak_memory'] / 2**30:.1f}", named]
    cells.append(f"{speeds[SIDES[0]] / speeds[SIDES[1]]:.2f}" if len(speeds) == 2 else "-")
    return "| " + " | ".join(cells) + " |"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON file that keeps every measurement")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--seconds", nargs="+", type=float, default=[10.0, 20.0, 60.0], help="audio of an utterance")
    parser.add_argument("--audio", type=float, default=320.0, help="seconds of audio in a batch")
    parser.add_argument("--longest", action="store_true", help="find the longest utterance that can be trained on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one measurement, compilation included")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for this call; the next one goes on")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    runs = Runs(options.results, options.limit, time.monotonic() + options.budget)
    common = {"settings": {}, "device": options.device, "size": options.size}
    if options.device == "cpu":
        common["patience"] = 0.2
    try:
        if options.longest:
            print("| model | " + " | ".join(f"{side}: longest utterance, s" for side in options.sides) + " |")
            print("| --- " * (1 + len(options.sides)) + "|")
            for model in options.models:
                found = [
                    longest(runs, Measurement(side, model, "training", 0.0, 1, **common)) for side in options.sides
                ]
                print(f"| {model} | " + " | ".join(f"{seconds:g}" for seconds in found) + " |", flush=True)
            return
        columns = "batch", "audio s/s", "MFU", "peak GiB", "settings"
        heads = ["model", "mode", "length", *(f"{side}: {column}" for side in options.sides for column in columns)]
        print("| " + " | ".join([*heads, "ratio"]) + " |\n" + "| --- " * (len(heads) + 1) + "|")
        for model in options.models:
            for mode in options.modes:
                for seconds in options.seconds:
                    batch = max(1, int(options.audio // seconds))
                    print(
                        row_of(runs, Measurement("", model, mode, seconds, batch, **common), options.sides), flush=True
                    )
    except TimeoutError:
        print(f"The time of this call is up; the same command goes on from {options.results}.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
