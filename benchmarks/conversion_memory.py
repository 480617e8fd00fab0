"""Peak memory of a conversion beside the size of the file, and its time beside that of a plain copy.

    python benchmarks/conversion_memory.py [w2v-bert-2.0 | hubert-large | hubert-xlarge] [--check] [--report DIRECTORY]

A model of that size with random weights is written as Transformers writes it, converted in a process of its own, and
converted back from an orbax checkpoint; the peak of each process is what the kernel counted. Beside each step the same
files are copied within the kernel (``shutil.copyfile``, which is sendfile) and flushed to the disk, each in turn three
times, of which the quickest counts. Nothing of the files is in the cache of the system when a conversion or a copy
begins, and its time ends when all is on the disk. Free memory is touched first: a virtual machine may have given it
back to its host, and getting it again takes longer than converting.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from speech_flax import HubertConfig, HubertForCTC, Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from speech_flax.conversion.safetensors_file import write_safetensors
from speech_flax.conversion.transformers_names import transformers_layout
from speech_flax.pretrained import parameter_shapes

_LIMIT = 1.5  # times the size of the file
_REPETITIONS = 3


def write_random_model(size: str, directory: Path) -> int:
    """A CTC model of that size in Transformers' layout, written tensor by tensor; returns the size of its file."""
    hubert = size.startswith("hubert")
    config = (HubertConfig if hubert else Wav2Vec2BertConfig).named(size, vocab_size=32)
    module = (HubertForCTC if hubert else Wav2Vec2BertForCTC)(config)
    config.replace(architectures=(type(module).__name__,)).save_pretrained(directory)
    layout = transformers_layout(parameter_shapes(module))
    random = np.random.default_rng(0)

    def tensors():
        for name, (_, _, shape) in layout.items():
            values = random.standard_normal(shape, dtype=np.float32)
            if name.endswith("original0"):
                yield 1 + 0.1 * values  # magnitudes of the positional convolution
            elif "norm" in name and name.endswith("weight"):
                yield 1 + 0.1 * values
            else:
                fan_in = max(1, int(np.prod(shape[1:])))
                yield values * (0.05 if len(shape) < 2 else fan_in**-0.5)

    shapes = {name: (shape, np.dtype(np.float32)) for name, (_, _, shape) in layout.items()}
    write_safetensors(directory / "model.safetensors", shapes, tensors(), {"format": "pt"})
    return (directory / "model.safetensors").stat().st_size


def forget(directory: Path) -> None:
    """Have everything in ``directory`` on the disk, and nothing of it in the system's cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, destination: Path) -> float:
    """Wall-clock seconds that a copy of all files takes until it is on the disk; the copy is removed again."""
    started = time.monotonic()
    shutil.copytree(source, destination, copy_function=shutil.copyfile)
    forget(destination)
    seconds = time.monotonic() - started
    shutil.rmtree(destination)
    return seconds


def touch_memory(size: int) -> None:
    """Use that many bytes, in a process of its own, so that this one's peak stays small: children begin with it."""
    subprocess.run([sys.executable, "-c", f"import numpy; numpy.ones({size}, numpy.uint8)"], check=True)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A process: peak memory [bytes], wall-clock and CPU seconds, exit code."""

    peak: int
    seconds: float
    of_cpu: float
    exit_code: int


def measure(arguments: list[str], destination: Path | None = None, output: int | None = None) -> Measured:
    """Run a conversion, until what it wrote is on the disk."""
    command = [sys.executable, "-m", "speech_flax.cli", "convert", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=output, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    if destination is not None:
        forget(destination)
    seconds = time.monotonic() - started
    return Measured(usage.ru_maxrss * 1024, seconds, usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status))


def convert_and_copy(name: str, source: Path, destination: Path, kind: str, file: int) -> bool:
    """Print memory and time of a conversion beside the time of a copy; returns whether it kept within the limit."""
    copies, conversions = [], []
    for _ in range(_REPETITIONS):
        forget(source)
        touch_memory(3 * file)
        copies.append(copy_seconds(source, destination.with_name("copy")))
        shutil.rmtree(destination, ignore_errors=True)
        forget(source)
        touch_memory(3 * file)
        conversions.append(measure([str(source), str(destination), "--to", kind], destination, subprocess.DEVNULL))
    copied, found = min(copies), min(conversions, key=lambda one: one.seconds)
    peak = max(one.peak for one in conversions)
    print(
        f"{name:<28} peak {peak / 2**30:5.2f} GiB = {peak / file:4.2f} x the file; "
        f"{found.seconds:5.1f} s = {found.seconds / copied:4.2f} x the copy's {copied:.1f} s "
        f"({file / 2**20 / copied:.0f} MiB/s); {found.of_cpu:.1f} s of CPU; exit code {found.exit_code}",
        flush=True,
    )
    return all(one.exit_code == 0 for one in conversions) and peak <= _LIMIT * file


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "size", nargs="?", default="w2v-bert-2.0", choices=("w2v-bert-2.0", "hubert-large", "hubert-xlarge")
    )
    options.add_argument("--check", action="store_true", help="Compare with PyTorch too, in a process of its own.")
    options.add_argument("--report", help="Where the report of the comparison goes.")
    options = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        source, ours, orbax, back = (Path(temporary) / name for name in ("source", "ours", "orbax", "back"))
        file = write_random_model(options.size, source)
        idle = measure(["--help"], output=subprocess.DEVNULL)
        print(
            f"{options.size}, {file / 2**30:.2f} GiB; a process that only explains itself needs "
            f"{idle.peak / 2**30:.2f} GiB and {idle.seconds:.1f} s"
        )
        passed = convert_and_copy("to Transformers' layout", source, ours, "torch", file)
        passed &= convert_and_copy("to orbax", source, orbax, "orbax", file)
        passed &= convert_and_copy("from orbax to Transformers'", orbax, back, "torch", file)
        identical = same_tensors(source / "model.safetensors", back / "model.safetensors")
        print(f"back is {'bit-identical' if identical else 'DIFFERENT'}")
        if options.check:
            report = ["--report", options.report] if options.report else []
            found = measure([str(ours), "--check", *report])
            print(
                f"compare with PyTorch         peak {found.peak / 2**30:5.2f} GiB = {found.peak / file:4.2f} x the file"
            )
            passed &= found.exit_code == 0
    return 0 if passed and identical else 1


def same_tensors(first: Path, last: Path) -> bool:
    """Whether two files hold the same bytes under the same names."""
    from speech_flax.conversion.safetensors_file import read_safetensors

    ours, theirs = read_safetensors(first), read_safetensors(last)
    return set(ours) == set(theirs) and all(
        ours[name].read().tobytes() == theirs[name].read().tobytes() for name in ours
    )


if __name__ == "__main__":
    sys.exit(main())
