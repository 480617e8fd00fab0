"""benchmarks/gpu.py without a GPU: what it imports, both sides on the CPU, and how it searches."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

#: Every dependency of the project but jax, flax, optax and numpy, and what only the tests have.
ABSENT = [
    "jaxtyping", "beartype", "orbax", "grain", "datasets", "jsonargparse", "docstring_parser", "safetensors",
    "huggingface_hub", "librosa", "soundfile", "soxr", "jiwer", "tqdm", "tensorboardX", "matplotlib", "torch",
    "transformers", "h5py",
]  # fmt: skip

WITHOUT = f"""
import sys
import flax, optax  # what they import themselves is theirs

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ImportError(name)

for name in [name for name in sys.modules if name.split(".")[0] in {ABSENT}]:
    if not name.startswith("orbax"):
        del sys.modules[name]
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_sides
for what in sys.argv[1:]:
    sys.argv[1] = what
    gpu_sides.main()
"""


@pytest.fixture(scope="module")
def gpu(benchmarks):
    import gpu

    return gpu


def _tiny(gpu, side, model, mode, settings):
    return gpu.Measurement(side, model, mode, 0.5, 2, settings, device="cpu", size="tiny", patience=0.0)


def test_the_side_of_speech_flax_needs_nothing_but_jax_flax_and_optax(gpu):
    measured = [
        _tiny(gpu, "speech_flax", "w2v-bert-2.0", "training", {"remat": "full"}),
        _tiny(gpu, "speech_flax", "hubert-large", "forward", {}),
    ]
    arguments = [json.dumps(dataclasses.asdict(what)) for what in measured]
    command = [sys.executable, "-c", WITHOUT, *arguments]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    results = [json.loads(line) for line in done.stdout.strip().splitlines()]
    assert [sorted(result) for result in results] == [["device", "flops", "peak_memory", "step", "versions"]] * 2


@pytest.mark.parametrize(("model", "attention"), [("hubert-large", "sdpa"), ("w2v-bert-2.0", "eager")])
def test_the_side_of_torch_trains(gpu, model, attention):
    from gpu_sides import measure_torch

    settings = {"attention": attention, "compile": False, "checkpointing": True}
    result = measure_torch(_tiny(gpu, "torch", model, "training", settings))
    assert result["step"] > 0
    assert result["versions"].keys() == {"torch", "transformers"}


class _Pretended:
    """Runs whose steps take what a formula says, and whose memory ends at so many seconds of audio."""

    def __init__(self, memory):
        self._memory, self.tried = memory, []

    def run(self, what):
        self.tried.append((what.seconds, what.batch))
        if what.batch * what.seconds > self._memory[what.settings.get("remat", "torch")]:
            return {"error": "out of memory"}
        slowdown = {"none": 1.0, "dots": 1.1, "full": 1.3}.get(what.settings.get("remat"), 2.0)
        seconds = slowdown * (1 + what.batch * what.seconds) / 1000
        return {"step": seconds, "peak_memory": 2**30, "flops": 10**9 * what.batch, "device": "NVIDIA H100 80GB HBM3"}


def test_the_fastest_setting_with_the_batch_that_fits_it_counts(gpu):
    runs = _Pretended({"none": 2, "dots": 90, "full": 200, "torch": 50})
    what = gpu.Measurement("speech_flax", "hubert-large", "training", 10.0, 16, {})
    fitted, _ = gpu.best(runs, what)
    assert (fitted.settings, fitted.batch) == ({"remat": "dots"}, 8)
    assert [batch for _, batch in runs.tried[:5]] == [16, 8, 4, 2, 1]
    row = gpu.row_of(runs, what, list(gpu.SIDES))
    assert row.split(" | ")[-1] == "1.84 |"  # 80 s in 89.1 ms against 40 s in 82 ms
    assert row.split(" | ")[3:5] == ["8", "898"]


def test_the_longest_utterance_is_found_to_a_tenth(gpu):
    runs = _Pretended({"full": 1000.0, "torch": 59.0})
    what = gpu.Measurement("speech_flax", "w2v-bert-2.0", "training", 0.0, 1, {})
    assert 900 <= gpu.longest(runs, what) <= 1000
    assert gpu.longest(runs, dataclasses.replace(what, side="torch")) == 0


def test_what_was_measured_is_kept_and_not_measured_again(gpu, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(gpu.Runs, "_measure", lambda self, what, limit: measured.append(what) or {"step": 1.0})
    what = _tiny(gpu, "torch", "hubert-large", "forward", {})
    for _ in range(2):
        assert gpu.Runs(tmp_path / "gpu.json", 1.0, time.monotonic() + 100).run(what) == {"step": 1.0}
    assert measured == [what]
    with pytest.raises(TimeoutError):
        gpu.Runs(tmp_path / "gpu.json", 1.0, time.monotonic()).run(dataclasses.replace(what, batch=1))


def test_a_process_that_dies_is_a_result(gpu, tmp_path):
    what = _tiny(gpu, "speech_flax", "hubert-large", "forward", {"remat": "no such thing"})
    result = gpu.Runs(tmp_path / "gpu.json", 60.0, time.monotonic() + 100).run(what)
    assert set(result) == {"error"}
    assert result["error"] != "out of memory"
