"""Memory that a step has freed stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
import numpy as np
from speech_flax.training.freed_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.empty(100_000_000, np.uint8)
    array[:] = 1
    del array
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def run(how: str, **environment: str) -> tuple[str, int]:
    """Whether memory is kept, and page faults of an allocation of 100 MB after one that was freed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ours |= {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0"} | environment  # a huge page is one page fault
    answer = subprocess.run([sys.executable, "-c", _SCRIPT, how], env=ours, capture_output=True, text=True, check=True)
    kept, faults = answer.stdout.split()
    return kept, int(faults)


@glibc
def test_freed_memory_is_used_again():
    kept, faults = run("keep")
    assert kept == "True" and faults < 100
    assert run("leave")[1] > 100  # what there is to gain


@glibc
def test_settings_of_the_user_stay():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
    assert run("keep", GLIBC_TUNABLES="glibc.malloc.hugetlb=1")[0] == "False"
