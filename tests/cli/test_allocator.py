import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mobilenet_jax.cli.allocator import TUNABLES

CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the allocator of glibc is tuned")

# Allocate and free a large buffer ten times in another thread, as a step of XLA does; print the number of page faults.
FAULTS = """
import resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
def fault():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.empty(2**27, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with ThreadPoolExecutor(1) as pool:
    pool.submit(fault).result()
    print(pool.submit(fault).result())
"""
HUGE = r"""
import re
import numpy as np
array = np.ones(2**26, np.uint8)
print(sum(int(kilobytes) for kilobytes in re.findall(r"AnonHugePages: +(\d+) kB", open("/proc/self/smaps").read())))
"""
# A command that restarts itself and prints its settings, process id, arguments and allocator.
COMMAND = """
import os, sys
from mobilenet_jax.cli.allocator import describe_allocator, restart_tuned
if __name__ == "__main__":
    restart_tuned()
    print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), sys.argv[1:], sep="|")
    print(describe_allocator())
"""


def run(program: str, *arguments: str, **variables: str) -> list[str]:
    """Return the lines that `python -c program` prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=CLEAN | variables, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@needs_glibc
def test_freed_buffers_are_reused_without_page_faults():
    default, kept = int(run(FAULTS)[0]), int(run(FAULTS, GLIBC_TUNABLES=TUNABLES)[0])
    assert default > 100
    assert kept < default / 100


@needs_glibc
@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no huge pages")
def test_large_arrays_are_in_huge_pages():
    assert int(run(HUGE, GLIBC_TUNABLES=TUNABLES)[0]) > 0.9 * 2**26 / 2**10


@needs_glibc
def test_a_command_starts_again_as_the_same_process_with_its_arguments():
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--flag=a b", "c"], env=CLEAN, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        tunables, pid, arguments = process.stdout.readline().strip().split("|")
        said = process.stdout.readline()
    assert (tunables, int(pid), arguments) == (TUNABLES, process.pid, "['--flag=a b', 'c']")
    assert re.match(r"malloc: GLIBC_TUNABLES=glibc\.malloc\.hugetlb=1:", said)


@needs_glibc
@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_a_variable_of_the_user_is_obeyed_and_named(variable):
    value = "2" if variable == "MALLOC_ARENA_MAX" else "glibc.malloc.arena_max=2"
    first, said = run(COMMAND, **{variable: value})
    assert first.split("|")[0] == (value if variable == "GLIBC_TUNABLES" else "None")
    assert said == f"malloc: as {variable} says"
