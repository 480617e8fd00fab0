"""A command is started anew with large pages of memory, where that helps and is in nobody's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speech_flax import huge_pages

_SCRIPT = """
import os, resource, sys
from pathlib import Path
from speech_flax import huge_pages

huge_pages._KERNEL, huge_pages._glibc = Path(os.environ["KERNEL"]), lambda: (2, 35)
print("started", os.getpid(), flush=True)
DISTURB
huge_pages.start_with_huge_pages()

import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.empty(100_000_000, np.uint8)[:] = 1
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*sys.argv[1:], sys.flags.utf8_mode, os.environ.get("GLIBC_TUNABLES"), faults)
"""


def run(directory: Path, kernel: str = "always [madvise] never\n", disturb: str = "", **environment: str) -> list[str]:
    """Lines that a script prints when it is run with arguments on a machine whose kernel says ``kernel``."""
    (directory / "kernel").write_text(kernel)
    (directory / "script.py").write_text(_SCRIPT.replace("DISTURB", disturb))
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ours |= {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0", "KERNEL": str(directory / "kernel")} | environment
    command = [sys.executable, "-X", "utf8", str(directory / "script.py"), "--steps", "3"]
    return subprocess.run(command, env=ours, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_same_process_runs_the_same_command_with_large_pages(tmp_path):
    first, second, said = run(tmp_path)
    assert first == second  # one process
    *given, tunables, faults = said.split()
    assert given == ["--steps", "3", "1"] and tunables == "glibc.malloc.hugetlb=1"
    kernel = huge_pages._KERNEL.read_text() if huge_pages._KERNEL.exists() else ""
    if "[madvise]" in kernel and huge_pages._glibc() >= huge_pages._GLIBC:  # else there is nothing to see
        assert int(faults) < 12_000 < int(run(tmp_path, GLIBC_TUNABLES="")[-1].split()[-1])  # 24,000 pages of 4 KiB


@pytest.mark.parametrize(
    "situation",
    [
        {"kernel": "[always] madvise never\n"},
        {"kernel": "always madvise [never]\n"},
        {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
        {"disturb": "huge_pages._GLIBC = (99, 0)"},
        {"disturb": "sys.settrace(lambda *_: None)"},  # a debugger
        {"disturb": "sys.argv = ['train.py']"},  # a notebook that runs a script
        {"JAX_PLATFORMS": "", "disturb": "huge_pages._ACCELERATORS = ('null',)"},
    ],
    ids=str,
)
def test_nothing_is_started_anew_where_it_does_not_help_or_is_in_the_way(tmp_path, situation):
    lines = run(tmp_path, **situation)
    assert len(lines) == 2
    assert lines[1].split()[-2] == situation.get("GLIBC_TUNABLES", "None")
