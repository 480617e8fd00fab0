"""The command ``speech-flax convert``: read any checkpoint, prove that nothing changed, write it, give it back."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from speech_flax.conversion.convert import ConversionError, Plan, convert, plan
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
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0, or 1 where something does not fit or differs too much."""
    options = parser().parse_args(arguments)
    source = open_source(_local(options.source), None if options.base is None else _local(options.base))
    print(f"{options.source}: {source.format}")
    try:
        planned = plan(source)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _describe(planned)
    if options.destination is not None:
        convert(planned, Path(options.destination), options.to)
        print(f"written: {options.destination}")
    return 0


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
    for remark in planned.remarks:
        print(f"note: {remark}")
