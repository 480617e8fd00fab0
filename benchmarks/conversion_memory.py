"""Peak memory and speed of a conversion, beside the size of the file.

    python benchmarks/conversion_memory.py [w2v-bert-2.0 | hubert-large | hubert-xlarge] [--check] [--report DIRECTORY]

A model of that size with random weights is written as Transformers writes it, converted in a process of its own, and
converted back from an orbax checkpoint; the peak of each process is what the kernel counted.
"""

import argparse
import json
import os
import resource
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


def measure(arguments: list[str], output: int | None = None) -> tuple[float, float, float, int]:
    """Peak memory [bytes], wall-clock and CPU seconds, and exit code of a conversion."""
    command = [sys.executable, "-m", "speech_flax.cli", "convert", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=output, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds, of_cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    return usage.ru_maxrss * 1024, seconds, of_cpu, os.waitstatus_to_exitcode(status)


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
        root = Path(temporary)
        file = write_random_model(options.size, root / "source")
        steps = {
            "to Transformers' layout": [str(root / "source"), str(root / "ours")],
            "to orbax": [str(root / "source"), str(root / "orbax"), "--to", "orbax"],
            "from orbax to PyTorch": [str(root / "orbax"), str(root / "back"), "--to", "torch"],
        }
        if options.check:
            report = ["--report", options.report] if options.report else []
            steps["compare with PyTorch"] = [str(root / "ours"), "--check", *report]
        idle, *_ = measure(["--help"], subprocess.DEVNULL)
        print(
            f"{options.size}: {file / 2**30:.2f} GiB; a process that only explains itself needs {idle / 2**30:.2f} GiB"
        )
        failed = False
        for name, arguments in steps.items():
            peak, seconds, of_cpu, code = measure(arguments)
            failed |= code != 0 or (not name.startswith("compare") and peak > _LIMIT * file)
            print(f"{name:<26} peak {peak / 2**30:5.2f} GiB = {peak / file:4.2f} x the file, exit code {code}")
            print(f"{'':<26} {seconds:.1f} s, {of_cpu:.1f} s of CPU, {file / 2**20 / seconds:.0f} MiB/s", flush=True)
        first, last = (root / name / "model.safetensors" for name in ("source", "back"))
        print(f"back is {'bit-identical' if same_tensors(first, last) else 'DIFFERENT'}")
    print(
        json.dumps({"peak of this process [GiB]": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)})
    )
    return int(failed)


def same_tensors(first: Path, last: Path) -> bool:
    """Whether two files hold the same bytes under the same names."""
    from speech_flax.conversion.safetensors_file import read_safetensors

    ours, theirs = read_safetensors(first), read_safetensors(last)
    return set(ours) == set(theirs) and all(
        ours[name].read().tobytes() == theirs[name].read().tobytes() for name in ours
    )


if __name__ == "__main__":
    sys.exit(main())
