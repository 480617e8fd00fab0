"""A preflight as text for people and as plain data for machines."""

import dataclasses
import json
from typing import Any

from speech_flax.training.estimate import COLLECTIVE_LATENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY
from speech_flax.training.preflight import BucketReport, Preflight
from speech_flax.training.tpu_slices import CHIPS


def as_json(report: Preflight) -> str:
    """The report as a JSON object: bytes and seconds, with what is derived from them."""
    data = dataclasses.asdict(report)
    for bucket, plain in zip(report.buckets, data["buckets"], strict=True):
        plain["memory"] |= {"temporaries": bucket.memory.temporaries, "fits": bucket.memory.fits}
    data |= {"fits": report.fits, "hours": report.hours, "assumptions": assumptions(report), "advice": advice(report)}
    return json.dumps(data, indent=2)


def as_text(report: Preflight) -> str:
    """The report in a table, with the costliest parts of the longest bucket, advice and assumptions."""
    mesh = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
    lines = [
        f"{report.slice_name}: {report.num_chips} chips, mesh {mesh}; {report.parameters / 1e6:.1f} M parameters, "
        f"{report.dtype}, remat {report.remat}, accumulation {report.accumulation}",
        "",
        "memory per chip [GiB]",
        *_table(
            ["bucket", "rows/chip", "peak", "of", "parameters", "optimizer", "batch", "temporaries", "most rows/chip"],
            [_memory_row(bucket) for bucket in report.buckets],
        ),
    ]
    fitting = [bucket for bucket in report.buckets if bucket.memory.fits]
    if fitting:
        method = "compiled instructions" if report.detailed else "quick lower bound"
        lines += [
            "",
            f"estimated time per step ({method})",
            *_table(
                ["bucket", "ms", "audio s/s/chip", "MFU", "matmul", "vector", "memory", "communication", "exposed"],
                [_time_row(bucket) for bucket in fitting],
            ),
            *_details(fitting[-1]),
        ]
    if report.hours is not None:
        lines += ["", f"{report.steps} steps take {report.hours:.2f} hours, without evaluation and checkpoints"]
    return "\n".join([*lines, "", *advice(report), "", "assumed:", *(f"- {text}" for text in assumptions(report))])


def advice(report: Preflight) -> list[str]:
    """Whether everything fits; by how much it does not, and what would help; or what more would fit."""
    too_big = [bucket for bucket in report.buckets if not bucket.memory.fits]
    if not too_big:
        shapes = ", ".join(f"{b.largest_rows_per_chip} x {b.shape.max_seconds:g} s" for b in report.buckets)
        return [f"fits; about the largest batches that would: {shapes} per chip (in proportion, not compiled)"]
    worst = max(too_big, key=lambda bucket: bucket.memory.peak)
    excess = (worst.memory.peak - worst.memory.usable) / 2**30
    lines = [
        f"does not fit: the {worst.shape.max_seconds:g} s bucket needs at least "
        f"{worst.memory.peak / 2**30:.2f} GiB per chip, {excess:.2f} GiB more than there are; what would help:"
    ]
    if worst.largest_rows_per_chip:
        rows = worst.largest_rows_per_chip * report.num_chips
        seconds = rows * worst.shape.max_seconds
        lines.append(
            f"- data.batch_seconds {seconds:g}: about {worst.largest_rows_per_chip} rows per chip instead of "
            f"{worst.rows_per_chip:g} (accumulation keeps the number per step)"
        )
    if report.remat != "full":
        lines.append("- model.remat full: keeps the input of every layer alone")
    if report.dtype != "bfloat16":
        lines.append("- model.dtype bfloat16: half the activations")
    state = worst.memory.parameters + worst.memory.optimizer
    if report.mesh["fsdp"] < report.num_chips:
        saved = state * (1 - report.mesh["fsdp"] / report.num_chips) / 2**30
        lines.append(
            f"- mesh.data 1, mesh.fsdp {report.num_chips}: saves {saved:.2f} GiB of parameters and moments per chip"
        )
    return lines


def assumptions(report: Preflight) -> list[str]:
    """What the figures rest on."""
    chip = CHIPS[report.slice_name.split(":")[0]]
    texts = [
        "compiled by the TPU compiler without a TPU: memory is the compiler's; times are estimates, nothing was run",
        f"{chip.name}: {chip.matmul_flops / 1e12:g} TFLOP/s in bfloat16 of which {MATMUL_EFFICIENCY:.0%} are reached, "
        f"{chip.memory_bandwidth / 1e9:g} GB/s of which {MEMORY_EFFICIENCY:.0%}, links of "
        f"{chip.link_bandwidth / 1e9:g} GB/s each way",
        "a communication moves bytes x (n-1)/n (all-reduce twice that) over one axis of the network in both "
        f"directions, one after another, and takes {COLLECTIVE_LATENCY * 1e6:g} us at least; a permutation goes one "
        "way and leaves the other direction free; what all send to all others has to pass the middle of the longest "
        "axis; what runs while they are under way hides them",
        "MFU: the products and convolutions of the forward pass and of the gradients that training needs, three times "
        "the former if nothing is frozen, over all padded frames; nothing that is recomputed",
        "no layer is dropped, the host keeps up with the device, all chips start together, and steps for the head "
        "alone take as long as others",
    ]
    if report.detailed:
        texts.append(f"cycles of the final instructions at {chip.clock / 1e9:g} GHz, loops as often as they run")
    else:
        texts.append("vector work is counted by its memory traffic alone: a lower bound; --detailed counts cycles")
    for reason, times in sorted({k: v for b in report.buckets for k, v in b.unknown.items()}.items()):
        texts.append(f"{reason} ({times} in one step)")
    return [*texts, *report.assumptions]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    return ["  " + "  ".join(row) for row in cells]


def _memory_row(bucket: BucketReport) -> list[str]:
    memory = bucket.memory
    parts = (memory.parameters, memory.optimizer, memory.batch, memory.temporaries)
    sizes = [f"{size / 2**30:.2f}" for size in (memory.peak, memory.usable, *parts)]
    return [f"{bucket.shape.max_seconds:g} s", f"{bucket.rows_per_chip:g}", *sizes, str(bucket.largest_rows_per_chip)]


def _time_row(bucket: BucketReport) -> list[str]:
    bounds = [_milliseconds(bucket.seconds_by_bound.get(name, 0.0)) for name in ("matmul", "vector", "memory")]
    return [
        f"{bucket.shape.max_seconds:g} s",
        _milliseconds(bucket.step_seconds),
        f"{bucket.audio_seconds_per_second_per_chip:.0f}",
        f"{bucket.utilisation:.3f}",
        *bounds,
        _milliseconds(bucket.communication_seconds),
        _milliseconds(bucket.exposed_communication_seconds),
    ]


def _details(bucket: BucketReport) -> list[str]:
    lines = ["", f"communication of the {bucket.shape.max_seconds:g} s bucket"]
    rows = [_communication_row(entry) for entry in bucket.communications]
    lines += _table(["kind", "devices", "times", "MiB", "ms", "exposed ms"], rows) if rows else ["  none"]
    lines += ["", f"costliest instructions of the {bucket.shape.max_seconds:g} s bucket"]
    for entry in bucket.costliest:
        share = entry["seconds"] / bucket.step_seconds
        lines.append(
            f"  {share:6.1%} {_milliseconds(entry['seconds'])} ms {entry['bound']:13} x{entry['times']:<4} "
            f"{entry['what'][:120]}"
        )
    return lines


def _communication_row(entry: dict[str, Any]) -> list[str]:
    kind = entry["kind"] + (" (async)" if entry["asynchronous"] else "")
    times = (_milliseconds(entry["seconds"]), _milliseconds(entry["exposed"]))
    return [kind, str(entry["devices"]), str(entry["times"]), f"{entry['bytes'] / 2**20:.1f}", *times]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
