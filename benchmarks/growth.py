"""How time and memory grow: with audio length, batch, depth, vocabulary and devices; and what compilation takes.

    python benchmarks/growth.py PART... [--where seconds=10,20 --where kind=forward] [--report]

Parts: cpu-length, cpu-batch, cpu-depth, cpu-vocabulary (measured on this CPU, two threads, float32, every row in a
fresh process); tpu-length, tpu-batch, tpu-depth, tpu-vocabulary, tpu-devices (estimated by the preflight, without a
TPU); compile-cpu, compile-tpu; first-step (the quickstart from the start of its process to the end of its first step).
``--where`` selects rows of a part by their fields. Results are kept in a JSON file by row; ``--report`` writes the
tables and pictures of all that it holds, and runs nothing if no part is named.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu import machine
from growth_measures import compile_on_cpu, compile_on_tpu, cpu_attentions, cpu_step, first_step, tpu_step
from growth_report import write_report

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "growth.json"

Row = dict[str, Any]

LENGTHS = (10, 20, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16)
VOCABULARIES = (32, 100, 320, 1000, 3200, 10_000)
DEPTHS = (2, 4, 8, 16, 24, 48)
#: Layers of the models on the CPU: of the published width, but few, so that a row takes a minute or two.
CPU_LAYERS = 2
#: Audio seconds per chip that tpu-length holds constant, and the longest bucket of the recipe.
SECONDS_PER_CHIP, RECIPE_SECONDS, RECIPE_ROWS = 600, 20.4, 16


def cpu_rows(kinds: tuple[str, ...] = ("forward", "training"), **changes: Any) -> Iterator[Row]:
    """One row per model and kind."""
    for model in ("hubert-base", "w2v-bert-2.0"):
        for kind in kinds:
            yield {
                "model": model,
                "kind": kind,
                "layers": CPU_LAYERS,
                "seconds": 10,
                "rows": 1,
                "symbols": 32,
                **changes,
            }


def tpu_rows(**changes: Any) -> Iterator[Row]:
    """The recipe's 20.4 s bucket on 16 chips, with ``changes``; ``rows`` are per chip."""
    yield {
        "slice": "v5e:4x4", "mesh": "data", "seconds": RECIPE_SECONDS, "rows": RECIPE_ROWS, "layers": 24, "symbols": 32,
        **changes,
    }  # fmt: skip


def rows_of(part: str) -> Iterator[Row]:
    """The rows of one part."""
    if part == "cpu-length":
        yield from (row for seconds in LENGTHS for row in cpu_rows(seconds=seconds))
    elif part == "cpu-batch":
        yield from (row for batch in BATCHES for row in cpu_rows(rows=batch))
    elif part == "cpu-depth":
        yield from (row for layers in DEPTHS[:3] for row in cpu_rows(layers=layers))
    elif part == "cpu-vocabulary":
        yield from (row for symbols in VOCABULARIES for row in cpu_rows(("training",), symbols=symbols))
    elif part == "tpu-length":
        for seconds in LENGTHS:
            for batch in dict.fromkeys((SECONDS_PER_CHIP // seconds, 1)):
                yield from tpu_rows(seconds=seconds, rows=batch)
    elif part == "tpu-batch":
        yield from (row for batch in (*BATCHES, 32) for row in tpu_rows(rows=batch))
    elif part == "tpu-depth":
        yield from (row for layers in DEPTHS for mesh in ("data", "fsdp") for row in tpu_rows(layers=layers, mesh=mesh))
    elif part == "tpu-vocabulary":
        yield from (row for symbols in VOCABULARIES for row in tpu_rows(symbols=symbols))
    elif part == "tpu-devices":
        for name in ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"):
            yield from (row for mesh in ("data", "fsdp") for row in tpu_rows(slice=name, mesh=mesh))
    elif part in ("compile-cpu", "compile-tpu"):
        yield from ({"layers": layers, "stack": "scanned"} for layers in DEPTHS)
        yield from ({"layers": layers, "stack": "unrolled"} for layers in DEPTHS[: 4 if part == "compile-cpu" else 3])
    elif part == "first-step":
        yield from ({"cache": cache} for cache in ("cold", "warm"))


MEASURES = {
    "cpu-length": cpu_attentions,
    "cpu-batch": cpu_step,
    "cpu-depth": cpu_step,
    "cpu-vocabulary": cpu_step,
    "tpu-length": tpu_step,
    "tpu-batch": tpu_step,
    "tpu-depth": tpu_step,
    "tpu-vocabulary": tpu_step,
    "tpu-devices": tpu_step,
    "compile-cpu": compile_on_cpu,
    "compile-tpu": compile_on_tpu,
    "first-step": first_step,
}


def selected(row: Row, wanted: list[tuple[str, list[str]]]) -> bool:
    return all(str(row.get(field)) in values for field, values in wanted)


def condition(text: str) -> tuple[str, list[str]]:
    """``field=value,value`` of the command line."""
    if not re.fullmatch(r"\w+=[^=]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form field=value,value")
    field, values = text.split("=")
    return field, values.split(",")


def run(part: str, wanted: list[tuple[str, list[str]]], results: dict[str, Any], file: Path) -> None:
    """Measure the selected rows of a part, and keep each in ``file`` as soon as it is known."""
    kept = {json.dumps(row["row"]): row for row in results["parts"].get(part, [])}
    every = list(rows_of(part))
    for row in every:
        if selected(row, wanted):
            print(part, json.dumps(row), end=" ", flush=True)
            measured = MEASURES[part](row)
            print(json.dumps(measured), flush=True)
            kept[json.dumps(row)] = {"row": row, "measured": measured}
            results["parts"][part] = [kept[key] for key in map(json.dumps, every) if key in kept]
            results["machine"] = machine()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *MEASURES], metavar="PART", help="what to measure")
    parser.add_argument("--where", type=condition, action="append", default=[], help="FIELD=VALUE[,VALUE] of rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file that results are added to")
    parser.add_argument("--report", action="store_true", help="write tables and pictures beside the JSON file")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {"parts": {}}
    for part in options.parts:
        run(part, options.where, results, options.results)
    if options.report:
        write_report(results, options.results.parent)
    elif not options.parts:
        parser.print_help(sys.stderr)


if __name__ == "__main__":
    main()
