"""How the C library's allocator treats the buffers of a step on CPU."""

import ctypes
import importlib.metadata
import importlib.util
import os

# <malloc.h> of glibc: parameter, value. One arena for all threads, no buffer of its own mapping, nothing given back.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
# Where users say it themselves, they are obeyed.
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> str:
    """Have glibc reuse freed buffers instead of returning them to the system; say what was done, for the log.

    XLA:CPU allocates a step's buffers anew each time. By default large ones are mapped and unmapped, and every page of
    them is a page fault: of the CPU time of a small network's step that is a quarter. The process keeps the most
    memory it ever used. To be called before JAX starts its threads, each of which would have an arena of its own. A
    variable of the allocator, another C library or an installed accelerator leave everything as it is.
    """
    if importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins"):
        return "malloc: as it is, for there is an accelerator"
    if given := [name for name in _VARIABLES if name in os.environ]:
        return f"malloc: as {', '.join(given)} says"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or not all(mallopt(*setting) for setting in _SETTINGS.values()):
        return "malloc: as the C library has it"
    values = ", ".join(f"{name}={value}" for name, (_, value) in _SETTINGS.items())
    return f"malloc: {values} (an allocator's variable, as GLIBC_TUNABLES, would leave it alone)"
