"""What becomes of the memory that a step on the CPU has freed."""

import ctypes
import os
from pathlib import Path

#: Parameters of ``mallopt`` in glibc, with the values that keep everything in one heap that never shrinks.
_KEEP_EVERYTHING = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Have the C library keep what programs on the CPU free, for the next step; whether it will.

    Otherwise every step gets its memory, gigabytes in training, page by page and zeroed from the operating system:
    a tenth of its time or more. Call this before JAX starts its threads. It changes nothing where there is an
    accelerator, another C library than glibc, or a setting of the user's (``MALLOC_*``, ``GLIBC_TUNABLES``).
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(any(Path("/dev").glob(name)) for name in _ACCELERATORS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError is Windows'
        return False
    return all(mallopt(*setting) for setting in _KEEP_EVERYTHING.values())
