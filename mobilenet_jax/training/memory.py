"""The memory that a process holds while it trains on a CPU."""

import ctypes
import platform

import jax
from jax.sharding import Mesh


def wait_for_buffers(state_step: jax.Array, mesh: Mesh) -> None:
    """On a CPU, wait until the step that computes `state_step` has ended.

    XLA:CPU allocates all buffers of a program when it is queued, and queues up to 32 programs. Each step of V2 in the
    queue would hold 57 MB for each image of 224 px. With one step at a time, the caches serve it better too.
    """
    if mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(state_step)


def return_free_memory() -> None:
    """Return freed memory to the system, if the C library is glibc; a compiler leaves half a gigabyte.

    With the allocator's settings of `cli/allocator.py`, glibc keeps what is freed for the next step. What the compiler
    freed lies in pieces between objects that live on, so a step cannot use it.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
