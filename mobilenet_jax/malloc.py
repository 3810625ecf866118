"""How the C library's allocator treats the buffers of a step on CPU."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os

# <malloc.h> of glibc: parameter, value. One arena for all threads, no buffer of its own mapping, nothing given back.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
# Where users say it themselves, they are obeyed.
_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
_HUGE_PAGE = 2**21  # bytes, on x86-64 and on ARM with pages of 4 kB
_MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h> of Linux


@functools.cache
def keep_freed_memory() -> str:
    """Have glibc reuse freed buffers, in huge pages, instead of returning them; say what was done, for the log.

    XLA:CPU allocates a step's buffers anew each time. By default large ones are mapped and unmapped, and every page of
    them is a page fault: of the CPU time of a small network's step that is a quarter. Huge pages are another tenth at
    224 pixels. The process keeps the most memory it ever used. To be called before JAX starts its threads, each of
    which would have an arena of its own; a second call changes nothing. A variable of the allocator, another C library
    or an installed accelerator leave everything as it is.
    """
    if importlib.util.find_spec("libtpu") or importlib.metadata.entry_points(group="jax_plugins"):
        return "malloc: as it is, for there is an accelerator"
    if given := [name for name in _VARIABLES if name in os.environ]:
        return f"malloc: as {', '.join(given)} says"
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(libc, "mallopt", None)
    if libc is None or mallopt is None or not all(mallopt(*setting) for setting in _SETTINGS.values()):
        return "malloc: as the C library has it"
    values = ", ".join(f"{name}={value}" for name, (_, value) in _SETTINGS.items())
    huge = _grow_heap(libc)
    pages = f"huge pages for {huge / 2**30:.0f} GB" if huge else "no huge pages"
    return f"malloc: {values}, {pages} (an allocator's variable, as GLIBC_TUNABLES, would leave it alone)"


def _grow_heap(libc: ctypes.CDLL) -> int:
    """Reserve half of the machine's memory as heap and advise huge pages for it; return its bytes.

    Nothing is used before it is written to, and what the heap grows by later has ordinary pages.
    """
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = -(-libc.sbrk(0) // _HUGE_PAGE) * _HUGE_PAGE
    libc.free(libc.malloc(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))
    size = libc.sbrk(0) - start
    return size if size > 0 and libc.madvise(start, size, _MADV_HUGEPAGE) == 0 else 0
