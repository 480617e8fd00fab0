"""This library beside PyTorch and Transformers on the CPU: the same computations, interleaved, in one run.

    python benchmarks/cpu.py [--only forward] [--models hubert-base] [--threads 1] [--seconds 10] [--repeats 5]
    python benchmarks/cpu.py --table

float32, random weights of the published sizes. Every side of a row runs in a process of its own with the same cores
and threads; the processes take turns, and the table has medians: of wall-clock time, of CPU time over all threads, and
the highest memory of a repetition above that of the idle process, parameters included. Results are kept in a JSON
file by row, so that a selection can be run at a time; ``--table`` prints all of them as Markdown.

The sides: ``ours``; ``torch`` with scaled dot product attention; ``torch.compile`` of the same; ``torch, MKL as on
Intel``: on processors of other makers MKL takes its AVX2 kernels, at half the speed of those with AVX-512, unless it is
told otherwise; and ``torch, huge pages``: with the large memory pages that ``train.py`` asks the C library for, and
``ours`` therefore has in training. ``--huge-pages`` gives them to all sides.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_sides import Case

from speech_flax.huge_pages import SETTING as HUGE_PAGES

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "cpu.json"
MODELS = ("hubert-base", "hubert-large", "w2v-bert-2.0")
INTEL = "torch, MKL as on Intel"
PAGED = "torch, huge pages"
#: What is measured of every side.
KEYS = ("wall_ms", "cpu_ms", "memory_mib")
#: Layers of the training steps: all of hubert-base, a quarter of the large ones, whose other layers cost the same.
TRAINED_LAYERS = {"hubert-base": 12, "hubert-large": 6, "w2v-bert-2.0": 6}


def rows() -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Every comparison, with its sides; the most important first."""
    usual, training = ("ours", "torch", INTEL), ("ours", "torch", PAGED, INTEL)
    for threads in (1, 2):
        compiled = ("torch.compile",) if threads == 1 else ()
        for model in MODELS:
            yield Case("forward", model, threads=threads), (*usual, *compiled)
        for model in MODELS:
            layers = TRAINED_LAYERS[model]
            yield Case("training", model, layers, threads=threads), (*training, *compiled)
        for symbols in (32, 1000):
            yield Case("ctc", rows=8, symbols=symbols, threads=threads), ("ours", "torch")
        yield Case("log-mel", threads=threads), ("ours", "numpy")
    yield Case("forward", "w2v-bert-2.0", seconds=60, threads=2), usual
    for model in MODELS:
        yield Case("forward", model, 6, rows=4, threads=2), usual
        yield Case("training", model, 2, rows=4, threads=2), training
    yield Case("forward", "hubert-base", seconds=60, threads=2), usual


def start(side: str, case: Case, preload: Path, huge_pages: bool, log: Any) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "JAX_PLATFORMS": "cpu"}
    if side == INTEL:
        environment["LD_PRELOAD"] = str(preload)
    if huge_pages or side == PAGED or (side == "ours" and case.kind == "training"):
        environment |= HUGE_PAGES
    script = str(Path(__file__).parent / "cpu_sides.py")
    command = [sys.executable, script, side, json.dumps(case._asdict())]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )


def mkl_as_on_intel(directory: Path) -> Path:
    """A shared library that makes MKL choose kernels by what the processor can do, whoever made it."""
    library = directory / "libintel.so"
    code = "int mkl_serv_intel_cpu_true(void) { return 1; }"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=code, text=True, check=True)
    return library


def measure(
    case: Case, sides: tuple[str, ...], repeats: int, preload: Path, huge_pages: bool
) -> dict[str, dict[str, float]]:
    """Medians by side; a side that fails is left out, and its last words are printed."""
    processes = {}
    for side in sides:
        log = preload.parent / "log"
        with log.open("w") as file:
            process = start(side, case, preload, huge_pages, file)
        if process.stdout.readline():
            processes[side] = process
        else:
            print(f"{side} failed on {case}: {log.read_text()[-500:]}", file=sys.stderr)
    answers = {side: [] for side in processes}
    for _ in range(repeats):
        for side, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            answers[side].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return {
        side: {
            "wall_ms": float(f"{1000 * statistics.median(answer['wall'] for answer in times):.4g}"),
            "cpu_ms": float(f"{1000 * statistics.median(answer['cpu'] for answer in times):.4g}"),
            "memory_mib": round(max(answer["memory"] for answer in times) / 2**20),
        }
        for side, times in answers.items()
    }


def machine() -> dict[str, Any]:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "numpy")}
    return {
        "processor": model.split(":")[1].strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def name(case: Case, huge_pages: bool) -> str:
    """A row's name in the results and the table."""
    parts = [case.kind if not case.model else f"{case.model} {case.kind}"]
    if case.kind == "ctc":
        parts = [f"CTC and gradient, {case.symbols} symbols"]
    if case.layers:
        parts.append(f"{case.layers} layers")
    parts.append(f"{case.rows} x {case.seconds:g} s")
    parts.append("1 thread" if case.threads == 1 else f"{case.threads} threads")
    return ", ".join(parts + ["huge pages"] * huge_pages)


def table(results: dict[str, Any]) -> Iterator[str]:
    """A line for each row: ours, and what every other side takes of wall-clock time, CPU time and memory beside it."""
    sides = list(dict.fromkeys(side for row in results["rows"].values() for side in row if side != "ours"))
    yield f"| row | wall [ms] | CPU [ms] | memory [MiB] | {' | '.join(sides)} |"
    yield "| --- " * (4 + len(sides)) + "|"
    for row, measured in results["rows"].items():
        cells = [row]
        if ours := measured.get("ours"):
            cells += [f"{ours[key]:.3g}" if ours[key] < 100 else f"{ours[key]:.0f}" for key in KEYS]
            others = [measured.get(side, {}) for side in sides]
            cells += [" / ".join(f"{other[key] / ours[key]:.2f}" for key in KEYS if other) for other in others]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="kinds of rows: forward, training, ctc, log-mel")
    parser.add_argument("--models", nargs="*", help="rows of these models")
    parser.add_argument("--threads", type=int, nargs="*", help="rows with so many threads")
    parser.add_argument("--seconds", type=float, nargs="*", help="rows with audio of this length")
    parser.add_argument("--rows", type=int, nargs="*", help="rows with so many utterances")
    parser.add_argument("--sides", nargs="*", help="these sides of every row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--huge-pages", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file that results are added to")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and run nothing")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    if not options.table:
        wanted = {"kind": options.only, "model": options.models, "threads": options.threads}
        wanted |= {"seconds": options.seconds, "rows": options.rows}
        with tempfile.TemporaryDirectory() as temporary:
            preload = mkl_as_on_intel(Path(temporary))
            for case, sides in rows():
                if all(chosen is None or getattr(case, field) in chosen for field, chosen in wanted.items()):
                    chosen = [side for side in sides if not options.sides or side in options.sides]
                    key = name(case, options.huge_pages)
                    results["rows"][key] = measure(case, chosen, options.repeats, preload, options.huge_pages)
                    results["machine"] = machine()
                    print(key, json.dumps(results["rows"][key]), flush=True)
                    options.results.parent.mkdir(parents=True, exist_ok=True)
                    options.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
