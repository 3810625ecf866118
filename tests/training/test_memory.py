import platform
import subprocess
import sys

import pytest

# Free all arrays but the last, which lies at the end of the heap; print the megabytes held before and after.
CODE = """
import resource
import numpy as np
from pathlib import Path
from mobilenet_jax.training.memory import return_free_memory
def measure():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
arrays = [np.ones(8000) for _ in range(3000)]  # 192 MB; each is too small to be mapped
arrays[:-1] = []
before = measure()
return_free_memory()
print(before, measure())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to return memory")
def test_memory_that_was_freed_below_the_end_of_the_heap_is_returned():
    printed = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    before, after = map(float, printed.split())
    assert before - after > 150
