"""The command ``speech-flax convert``: read any checkpoint, prove that nothing changed, write it, give it back."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from speech_flax.conversion.convert import ConversionError, Plan, convert, parameters, plan, widened_leaves
from speech_flax.conversion.interruption import Interrupted, interruptible
from speech_flax.conversion.published import PUBLISHED
from speech_flax.conversion.source import open_source
from speech_flax.pretrained import pretrained_directory

_DESCRIPTION = """\
Convert a checkpoint. SOURCE is recognised by what it holds: a directory or hub id in Transformers' layout (safetensors,
.bin, either of them in shards, tf_model.h5), a file of fairseq (HuBERT), Seamless or fairseq2 (w2v-BERT 2.0), a head of
s3prl, or an orbax checkpoint of this library. DESTINATION is a directory that this library and Transformers both load.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="speech-flax convert", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("source", metavar="SOURCE", help="File, directory, or id of a model on the hub.")
    options.add_argument(
        "destination", metavar="DESTINATION", nargs="?", help="Directory to make. Without it SOURCE is only checked."
    )
    options.add_argument(
        "--to",
        choices=("torch", "orbax"),
        default="torch",
        help="torch (default): Transformers' layout, which PyTorch and this library both load; orbax: a checkpoint of "
        "the parameters alone.",
    )
    options.add_argument("--base", metavar="MODEL", help="The model below a head of s3prl: file, directory or hub id.")
    evidence = options.add_argument_group("evidence")
    evidence.add_argument(
        "--check",
        action="store_true",
        help="Run the model beside PyTorch's on the same audio and compare inputs, every hidden state, outputs, "
        "transcript and CTC loss. The exit code is 1 if they differ by more than the tolerance, which is printed.",
    )
    evidence.add_argument("--gradients", action="store_true", help="Compare the gradient of every parameter too.")
    stored = evidence.add_mutually_exclusive_group()
    stored.add_argument(
        "--write-reference", metavar="FILE", help="Keep what PyTorch computes, to compare on a machine without it."
    )
    stored.add_argument("--reference", metavar="FILE", help="Compare with such a file instead of running PyTorch.")
    evidence.add_argument("--audio", metavar="FILE", nargs="+", help="Recordings to compare on; else synthetic ones.")
    evidence.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="Computation type of our side."
    )
    evidence.add_argument(
        "--precision",
        choices=("highest", "default"),
        default="highest",
        help="Matrix products of float32: as precise as float32, or as the accelerator does them by default.",
    )
    evidence.add_argument(
        "--report", metavar="DIRECTORY", help="Where parity.json and parity.png go; default DESTINATION/parity."
    )
    evidence.add_argument(
        "--check-published", choices=tuple(PUBLISHED), help="Compare with the numbers that the model's makers give."
    )
    evidence.add_argument(
        "--published-files", metavar="DIRECTORY", help="Recordings and features of fairseq's own tests."
    )
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code is 0, 1 where something does not fit or differs too much, or that of a signal.

    Raises:
      ValueError: options that do not go together, or a source that cannot be read; likewise OSError and ImportError.
    """
    options = parser().parse_args(arguments)
    compares = bool(options.check or options.reference or options.write_reference)
    for name in ("gradients", "audio", "dtype", "precision", "report"):
        if not compares and getattr(options, name) != parser().get_default(name):
            raise ValueError(f"--{name} says how to compare: add --check, --reference FILE or --write-reference FILE")
    try:
        with interruptible():
            return _run(options)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return interrupted.exit_code


def _run(options: argparse.Namespace) -> int:
    source = open_source(_local(options.source), None if options.base is None else _local(options.base))
    print(f"{options.source}: {source.format}")
    try:
        planned = plan(source)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _describe(planned)
    if options.destination is not None:
        if options.to == "orbax" and (widened := widened_leaves(planned)):
            print(
                f"note: {len(widened)} parameters differ in type between layers and get the widest: {widened[0]}, ..."
            )
        convert(planned, Path(options.destination), options.to)
        print(f"written: {options.destination}")
    else:
        print("every tensor has its place")
    passed = True
    if options.check or options.reference or options.write_reference:
        passed &= _check(planned, options)
    if options.check_published:
        passed &= _check_published(planned, options)
    return 0 if passed else 1


def _local(name: str) -> Path:
    """The local path of a file, a directory or a model on the hub."""
    path = Path(name)
    return path if path.exists() else pretrained_directory(name, weights=True)


def _describe(planned: Plan) -> None:
    tensors = len(planned.source.tensors)
    print(f"{type(planned.module).__name__}: {planned.num_parameters / 1e6:.2f} M parameters in {tensors} tensors")
    if planned.source.config is None:
        print("configuration, read off the tensors where it differs from the defaults:")
        default = type(planned.config)().to_dict()
        for name, value in planned.config.to_dict().items():
            if value != default.get(name):
                print(f"  {name}: {json.dumps(value)}")
    for remark in (*planned.assumptions, *planned.remarks):
        print(f"note: {remark}")


def _checked(planned: Plan, options: argparse.Namespace) -> Plan:
    """What is compared: what was written, or the source."""
    return planned if options.destination is None else plan(open_source(Path(options.destination)))


def _processor_directory(checked: Plan) -> Path:
    return checked.source.directory or checked.source.path.parent


def _check(planned: Plan, options: argparse.Namespace) -> bool:
    """Make or open the reference, compare what was written (or the source) with it, and report."""
    from speech_flax.conversion.evidence import check
    from speech_flax.conversion.reference import read_reference

    checked = _checked(planned, options)
    with tempfile.TemporaryDirectory() as aside:
        if options.reference:
            file = Path(options.reference)
        else:
            file = Path(options.write_reference or Path(aside) / "reference.safetensors")
            _write_reference(planned, options, file, Path(aside) / "model")
            if options.write_reference:
                print(f"written: {file}")
            if not options.check:
                return True
        print("computing with this library")
        evidence = check(
            checked.module,
            parameters(checked),
            read_reference(file),
            directory=_processor_directory(checked),
            assumed=len(planned.assumptions),
            dtype=options.dtype,
            precision=options.precision,
            gradients=options.gradients,
        )
    print("\n".join(evidence.lines()))
    if options.report or options.destination:
        report = Path(options.report or Path(options.destination) / "parity")
        evidence.save(report)
        print(f"written: {report}/parity.json, {report}/parity.png")
    return evidence.passed


def _write_reference(planned: Plan, options: argparse.Namespace, file: Path, aside: Path) -> None:
    """Run Transformers on the source itself where it can read it, else on what was converted from it."""
    from speech_flax.audio.decoding import load_audio
    from speech_flax.conversion.reference import example_waveforms, write_reference

    waveforms = [load_audio(audio) for audio in options.audio] if options.audio else example_waveforms()
    directory = planned.source.directory
    if not planned.source.is_pretrained_directory:
        if options.destination is not None and options.to == "torch":
            directory = Path(options.destination)
        else:
            convert(planned, aside)
            directory = aside
        print("note: Transformers does not read this source; its side runs on the converted weights")
    print("computing with Transformers and PyTorch")
    write_reference(file, directory, planned.config, waveforms, gradients=options.gradients)


def _check_published(planned: Plan, options: argparse.Namespace) -> bool:
    from speech_flax.conversion.published import check_published

    example = PUBLISHED[options.check_published]
    files = None if options.published_files is None else Path(options.published_files)
    checked = _checked(planned, options)
    comparisons = check_published(example, checked.module, parameters(checked), _processor_directory(checked), files)
    for one in comparisons:
        sign = "same" if one.passed else "DIFFERENT"
        print(f"{one.name}: {one.ours!r}, published {one.published!r} ({example.source}): {sign}")
    return all(one.passed for one in comparisons)
