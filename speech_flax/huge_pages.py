"""Large pages of memory for programs on the CPU."""

import os
import re
import sys
from pathlib import Path

#: What has the C library ask for large pages, in the environment that a program starts with.
SETTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
#: The first version that can ask for large pages.
_GLIBC = (2, 35)
#: To whom the kernel gives large pages: ``always [madvise] never``.
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_with_huge_pages() -> None:
    """Start this command anew, in the same process, with a C library that asks for large pages of memory.

    XLA gets the memory of every step on the CPU from the operating system, gigabytes in training, in pages of 4 KiB
    that are zeroed one by one: a tenth of its time. The C library reads its settings when a program starts, so call
    this before anything is imported that takes long.

    It does nothing where that would not help or be in the way: where there is an accelerator, another C library than
    glibc 2.35 or later, a kernel that gives large pages to all or to none, a setting of the user's (``MALLOC_*``,
    ``GLIBC_TUNABLES``) or a debugger, and when Python was started for something else, a notebook say.
    """
    if _helps() and _is_the_command():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTING)


def _helps() -> bool:
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(any(Path("/dev").glob(name)) for name in _ACCELERATORS):
        return False
    return _glibc() >= _GLIBC and _KERNEL.exists() and "[madvise]" in _KERNEL.read_text()


def _glibc() -> tuple[int, int]:
    """The version of glibc, (0, 0) for another C library."""
    known = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {})
    found = re.match(r"glibc (\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "") if known else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _is_the_command() -> bool:
    """Whether Python was started to run this command, and can be once more."""
    return bool(sys.executable) and sys.gettrace() is None and sys.orig_argv[-len(sys.argv) :] == sys.argv
