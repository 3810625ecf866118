"""The settings of the C library's allocator that make training on CPU faster."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

# hugetlb=1: use huge pages for the heap.
# arena_max=1: use one heap for all threads; otherwise the heaps of further threads end at 64 MB, and larger buffers are
#   mapped.
# mmap_threshold: take buffers below 10 GB from the heap instead of giving each its own mapping.
# trim_threshold: return freed memory to the system only when it exceeds 20 GB.
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"
    "glibc.malloc.mmap_threshold=10000000000:glibc.malloc.trim_threshold=20000000000"  # bytes
)
# If the user sets one of these, the settings of the user hold.
_VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def tuned_environment() -> dict[str, str]:
    """Return the environment variables that make glibc keep freed buffers instead of returning them to the system.

    XLA:CPU allocates the buffers of each step again. By default, glibc maps and unmaps large buffers, and each page is
    a page fault: a quarter of the CPU time of a small network's step. The price is that a tuned process keeps the
    largest amount of memory that it ever used. The result is empty if an accelerator is installed, if the C library is
    not glibc, or if the user has set one of the variables.
    """
    if importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins"):
        return {}
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return {}
    return {"GLIBC_TUNABLES": TUNABLES}


def restart_tuned() -> None:
    """Restart this command in the same process under `tuned_environment`: glibc reads its settings only at the start.

    Do nothing if `tuned_environment` is empty, which it is after the restart.
    """
    if variables := tuned_environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def describe_allocator() -> str:
    """Describe the allocator of this process in one line for the log."""
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        return f"malloc: GLIBC_TUNABLES={TUNABLES} (to use other settings, set this variable, even to nothing)"
    given = [name for name in _VARIABLES if name in os.environ]
    return f"malloc: as {', '.join(given)} says" if given else "malloc: default settings"
