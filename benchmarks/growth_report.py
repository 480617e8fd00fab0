"""The tables and pictures of ``growth.py``."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
Point = tuple[float, float | None]

#: What grows in a part, and how it is called.
GROWING = {
    "length": ("seconds", "audio [s]"),
    "batch": ("rows", "rows (utterances)"),
    "depth": ("layers", "layers"),
    "vocabulary": ("symbols", "symbols"),
}
_COLOURS = {"forward": "tab:blue", "training": "tab:orange"}


def seconds(measured: dict[str, Any]) -> str:
    """A cell: seconds of a step."""
    return f"{measured['step_s']:.3g}" if "step_s" in measured else measured.get("error", "not run")


def gibibytes(measured: dict[str, Any]) -> str:
    """A cell: measured memory or, in brackets, what a program that was not run needs by the compiler's count."""
    if "peak_gib" in measured:
        return f"{measured['peak_gib']:.2f}"
    return f"[{measured['needed_gib']:.1f}]" if "needed_gib" in measured else ""


def table(header: list[str], rows: Iterator[list[Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| {' | '.join(header)} |"
    yield f"| {' | '.join(['---'] * len(header))} |"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def cpu_table(part: str, rows: Rows) -> Iterator[str]:
    field, label = GROWING[part.removeprefix("cpu-")]
    ordered = sorted(rows, key=lambda row: (row["row"]["model"], row["row"]["kind"]))
    both = "library" in rows[0]["measured"]
    header = ["model", "", label, "step [s]", "peak [GiB]"]
    header += ["plain attention: step [s]", "peak [GiB]"] if both else []

    def cells() -> Iterator[list[Any]]:
        for row in ordered:
            sides = [row["measured"][side] for side in ("library", "plain")] if both else [row["measured"]]
            numbers = [cell for side in sides for cell in (seconds(side), gibibytes(side))]
            yield [row["row"]["model"], row["row"]["kind"], row["row"][field], *numbers]

    return table(header, cells())


def tpu_table(part: str, rows: Rows) -> Iterator[str]:
    labels = {"slice": "slice", "mesh": "mesh", "seconds": "audio [s]", "rows": "rows/chip", "layers": "layers"}
    labels |= {"symbols": "symbols"}
    varied = [name for name in labels if len({row["row"][name] for row in rows}) > 1] or ["rows"]
    header = [labels[name] for name in varied] + ["step [ms]", "audio s/s/chip"]
    header += ["MFU at most", "exposed communication [ms]", "peak [GiB]", "parameters and moments [GiB]"]

    def cells() -> Iterator[list[Any]]:
        for row in rows:
            asked, got = row["row"], row["measured"]
            numbers = ["does not fit", "", "", ""]
            if "step_s" in got:
                speed = f"{got['audio_seconds_per_second_per_chip']:.0f}"
                numbers = [f"{1000 * got['step_s']:.0f}", speed, f"{got['mfu']:.2f}"]
                numbers.append(f"{1000 * got['exposed_communication_s']:.0f}")
            state = got["parameters_gib"] + got["optimizer_gib"]
            yield [*(asked[name] for name in varied), *numbers, f"{got['peak_gib']:.2f}", f"{state:.2f}"]

    return table(header, cells())


def compile_table(part: str, rows: Rows) -> Iterator[str]:
    if part == "compile-tpu":
        cells = ([row["row"]["layers"], row["row"]["stack"], row["measured"]["compilation_s"]] for row in rows)
        return table(["layers", "", "process, tracing and compilation until scheduled [s]"], cells)
    names = ("lowering_s", "compilation_s")
    cells = ([row["row"]["layers"], row["row"]["stack"], *(row["measured"][name] for name in names)] for row in rows)
    return table(["layers", "", "tracing and lowering [s]", "compilation [s]"], cells)


def first_step_table(part: str, rows: Rows) -> Iterator[str]:
    names = {"data_planned_s": "data planned", "first_program_s": "first program", "first_step_s": "first step done"}
    cells = ([row["row"]["cache"], *(row["measured"].get(name, "") for name in names)] for row in rows)
    return table(["cache of programs", *(f"{label} [s]" for label in names.values())], cells)


def _table_of(part: str) -> Callable[[str, Rows], Iterator[str]]:
    if part == "first-step":
        return first_step_table
    return {"cpu": cpu_table, "tpu": tpu_table, "compile": compile_table}[part.split("-")[0]]


def points(table: Rows, x: str, y: str, *sides: str, **chosen: Any) -> list[Point]:
    """The rows with the ``chosen`` fields as points; those without ``y`` are left out."""
    found = []
    for row in table:
        measured = row["measured"]
        for side in sides:
            measured = measured[side]
        if all(row["row"][name] == value for name, value in chosen.items()) and y in measured:
            found.append((row["row"][x], measured[y]))
    return sorted(found)


def _line(axes: "Axes", of_line: list[Point], label: str, **style: Any) -> None:
    if of_line:
        axes.plot(*zip(*of_line, strict=True), label=label, **{"marker": "o", "markersize": 3.5, **style})


def _log_axes(axes: "Axes", xs: list[float], ylabel: str, xlabel: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(sorted(set(xs)), labels=[f"{x:g}" for x in sorted(set(xs))])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def draw_cpu(part: str, rows: Rows) -> "Figure":
    """Time above, memory below; one column per model; hollow marks are needs that were not run."""
    from matplotlib.figure import Figure

    field, label = GROWING[part.removeprefix("cpu-")]
    models = list(dict.fromkeys(row["row"]["model"] for row in rows))
    both = "library" in rows[0]["measured"]
    sides = {"library": "-", "plain": "--"} if both else {"": "-"}
    figure = Figure(figsize=(9, 7), layout="constrained")
    every = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False)
    for column, model in enumerate(models):
        for above, y, unit in ((every[0][column], "step_s", "step [s]"), (every[1][column], "peak_gib", "peak [GiB]")):
            for kind in dict.fromkeys(row["row"]["kind"] for row in rows):
                for side, dashes in sides.items():
                    at, chosen = [side] if side else [], {"model": model, "kind": kind}
                    name = kind + {"plain": ", plain attention"}.get(side, "")
                    style = {"color": _COLOURS[kind], "linestyle": dashes}
                    measured = points(rows, field, y, *at, **chosen)
                    _line(above, measured, name, **style)
                    if y == "peak_gib":
                        ran = {x for x, _ in measured}
                        needed = points(rows, field, "needed_gib", *at, **chosen)
                        missing = [point for point in needed if point[0] not in ran]
                        missing_label = None if not missing else f"{name}, by the compiler"
                        _line(above, missing, missing_label, **style | {"linestyle": ":", "markerfacecolor": "white"})
            _log_axes(above, [row["row"][field] for row in rows], unit, label)
            if part == "cpu-vocabulary":
                above.set(yscale="linear", ylim=(0, None))
            above.legend(fontsize=7)
        every[0][column].set_title(model)
    grown = {"length": "audio length", "batch": "batch", "depth": "depth", "vocabulary": "vocabulary"}
    figure.suptitle(f"CPU, two threads, float32, against {grown[part.removeprefix('cpu-')]}")
    return figure


def draw_tpu(parts: dict[str, Rows]) -> "Figure":
    """Step above, memory below; one column per part."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = [part for part in parts if part.startswith("tpu-")]
    figure = Figure(figsize=(3.4 * len(columns), 6.4), layout="constrained")
    every = figure.subplots(2, len(columns), squeeze=False)
    for column, part in enumerate(columns):
        rows = [{**row, "row": row["row"] | {"chips": _chips(row["row"]["slice"])}} for row in parts[part]]
        field, label = GROWING.get(part.removeprefix("tpu-"), ("chips", "chips"))
        for axes, y, unit in ((every[0][column], "step_s", "step [s]"), (every[1][column], "peak_gib", "peak [GiB]")):
            if part == "tpu-length":
                whole = [row for row in rows if row["row"]["rows"] * row["row"]["seconds"] == 600]
                _line(axes, points(whole, field, y), "600 s per chip")
                _line(axes, points(rows, field, y, rows=1), "one row per chip")
            else:
                for mesh, name in (("data", "data parallel"), ("fsdp", "fsdp")):
                    _line(axes, points(rows, field, y, mesh=mesh), name)
            _log_axes(axes, [row["row"][field] for row in rows], unit, label)
            if y == "peak_gib":
                axes.axhline(rows[0]["measured"]["usable_gib"], color="tab:red", linewidth=1, label="v5e has")
            if y == "peak_gib" or part in ("tpu-devices", "tpu-vocabulary"):
                axes.set(yscale="linear", ylim=(0, 1.1 * axes.get_ylim()[1]))
                axes.yaxis.set_major_formatter("{x:g}")
            if y == "peak_gib" and part in ("tpu-batch", "tpu-depth"):
                axes.set(xscale="linear", xlim=(0, None))
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                axes.xaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="x", labelsize=7)
            axes.legend(fontsize=7)
        every[0][column].set_title(part.removeprefix("tpu-"))
    figure.suptitle("Training step of w2v-bert-2.0, estimated lower bound (v5e, bfloat16, remat full)")
    return figure


def _chips(slice_name: str) -> int:
    first, second = slice_name.split(":")[1].split("x")
    return int(first) * int(second)


def draw_compilation(parts: dict[str, Rows]) -> "Figure":
    from matplotlib.figure import Figure

    titles = {"compile-cpu": "XLA:CPU, tracing left out", "compile-tpu": "TPU compiler until scheduled, v5e:4x4"}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (part, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        rows = parts.get(part, [])
        for stack in ("scanned", "unrolled"):
            _line(axes, points(rows, "layers", "compilation_s", stack=stack), stack)
        axes.set(title=title, xlabel="layers", ylabel="compilation [s]", ylim=(0, None), xlim=(0, None))
        axes.set_xticks(sorted({row["row"]["layers"] for row in rows}))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def write_report(results: dict[str, Any], directory: Path) -> None:
    """Print the tables as Markdown; write ``growth_*.png`` into ``directory``."""
    parts: dict[str, Rows] = results["parts"]
    for part, rows in parts.items():
        print(f"\n### {part}\n")
        print("\n".join(_table_of(part)(part, rows)))
    pictures = {part: draw_cpu(part, rows) for part, rows in parts.items() if part.startswith("cpu-")}
    if any(part.startswith("tpu-") for part in parts):
        pictures["tpu"] = draw_tpu(parts)
    if any(part.startswith("compile-") for part in parts):
        pictures["compilation"] = draw_compilation(parts)
    for name, figure in pictures.items():
        figure.savefig(directory / f"growth_{name.replace('-', '_')}.png", dpi=90)
