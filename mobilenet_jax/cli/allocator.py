"""How the C library's allocator treats the buffers of a step on CPU."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

# Huge pages wherever the heap is; one heap for all threads, for those of other threads end at 64 MB and map what is
# larger; no buffer below 10 GB gets a mapping of its own; freed memory is kept up to 20 GB.
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"
    "glibc.malloc.mmap_threshold=10000000000:glibc.malloc.trim_threshold=20000000000"  # bytes
)
# Where users say it themselves, they are obeyed.
_VARIABLES = (
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def tuned_environment() -> dict[str, str]:
    """The variables under which glibc reuses freed buffers, in huge pages, instead of returning them to the system.

    XLA:CPU allocates a step's buffers anew each time. By default large ones are mapped and unmapped, and every page of
    them is a page fault: of the CPU time of a small network's step that is a quarter. A tuned process keeps the most
    memory it ever used. Empty where an installed accelerator, another C library or the user has another say.
    """
    if importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins"):
        return {}
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return {}
    return {"GLIBC_TUNABLES": TUNABLES}


def restart_tuned() -> None:
    """Run this very command again under `tuned_environment`, in the same process: glibc reads it at the start alone."""
    if variables := tuned_environment():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def describe_allocator() -> str:
    """What holds in this process, for the log."""
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        return f"malloc: GLIBC_TUNABLES={TUNABLES} (set it, even to nothing, to have it otherwise)"
    given = [name for name in _VARIABLES if name in os.environ]
    return f"malloc: as {', '.join(given)} says" if given else "malloc: as it is"
