import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Allocate and free what a step allocates and frees, ten times; print the page faults.
PROGRAM = """
import resource, sys
import numpy as np
from mobilenet_jax.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), file=sys.stderr)
def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.empty(2**25, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fault()
print(fault())
"""


CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}


def run(mode: str, **variables: str) -> tuple[int, str]:
    """(Page faults, what was said) of the program."""
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=CLEAN | variables, capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc alone is tuned")
def test_freed_buffers_are_reused_without_page_faults():
    default, kept = run("leave")[0], run("keep")[0]
    assert default > 1000
    assert kept < default / 100


HUGE = r"""
from mobilenet_jax.malloc import keep_freed_memory
print(keep_freed_memory())
import re
import numpy as np
array = np.ones(2**26, np.uint8)
mappings = open("/proc/self/smaps").read().split("[heap]")[1:]
print(sum(int(re.search(r"AnonHugePages: +(\d+) kB", mapping)[1]) for mapping in mappings))
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not SETTING.exists() or "[never]" in SETTING.read_text(),
    reason="this system has no huge pages to give",
)
def test_large_arrays_are_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", HUGE], env=CLEAN, capture_output=True, text=True, check=True)
    said, kilobytes = done.stdout.splitlines()
    assert int(kilobytes) > 0.9 * 2**26 / 2**10
    assert re.search(r"huge pages for [1-9]\d* GB", said)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc alone is tuned")
def test_a_variable_of_the_user_is_obeyed_and_named():
    faults, said = run("keep", MALLOC_ARENA_MAX="2")
    assert said.strip() == "malloc: as MALLOC_ARENA_MAX says"
    assert faults > 1000
