"""Measure the memory of the training loader, the time to its first batch, and its speed.

    python -m benchmarks.loader_memory --batch_size=4096

The loader reads JPEGs of 500x375 pixels, crops and flips them as for ImageNet. A consumer holds one batch at a time.
Memory is what this process and the workers have more than before the loader was made; a page that several processes
share counts once. This runs on Linux, because it reads /proc. The exit code is 1 if memory is above the limit that
docs/data.md states for the images, and 100 MB for each process, for code and for images that are being decoded.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.photographs import write_photographs
from configs import base
from mobilenet_jax.data import loader
from mobilenet_jax.data.pieces import PIECE, divide

PROCESS_BYTES = 100 * 10**6


class MemoryMeter:
    """Within this context, `peak` is the largest memory in bytes of this process and its children so far."""

    def __init__(self):
        self.peak = self.measure()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryMeter":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self.measure())

    @staticmethod
    def measure() -> int:
        """Return the memory of this process and its children now, in bytes."""
        children = [child.pid for child in multiprocessing.active_children()]
        return sum(_read_share(pid) for pid in (os.getpid(), *children) if pid)


def _read_share(pid: int) -> int:
    """Return the memory of a process in bytes, shared pages divided among those that share them; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def limit_memory(batch_size: int, *, image_bytes: int, workers: int, threads: int) -> int:
    """Return the limit of docs/data.md for the images, in bytes, with the batch that the consumer holds."""
    count = len(divide(batch_size))
    if workers:
        images = 3 * batch_size + 8 * workers * PIECE
    else:
        images = batch_size * (2 + math.ceil(max(count, 2 * threads) / count))
    return images * image_bytes


def measure(flags: argparse.Namespace, folder: str) -> dict[str, float]:
    """Take batches from a new loader; return seconds to the first one, images/s after it, and memory in bytes."""
    data: Any = base.get_config().data
    data.update({"source": "folder", "path": folder, "crop": "inception", "flip": True, "workers": flags.workers})
    data.update({"batch_size": flags.batch_size, "image_size": flags.resolution})
    loader.MEMORY_BYTES = 0  # decodes each photograph each time, as for a data set that does not fit in memory
    source = loader.open_source(data, "train")
    before = MemoryMeter.measure()
    begun = time.perf_counter()
    iterator = loader.make_train_iterator(data, seed=0, process_index=0, process_count=1, source=source)
    with MemoryMeter() as meter:
        held = next(iterator)
        first = time.perf_counter() - begun
        for _ in range(flags.batches):
            held = next(iterator)
        rate = flags.batches * len(held["labels"]) / (time.perf_counter() - begun - first)
        time.sleep(flags.pause)  # the loader goes on until it is as far ahead as it may be
    iterator.close()
    return {"first": first, "rate": rate, "memory": meter.peak - before}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4096, help="images; default: %(default)s")
    parser.add_argument("--resolution", type=int, default=224, help="pixels; default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: threads; default: %(default)s")
    parser.add_argument("--batches", type=int, default=3, help="after the first one; default: %(default)s")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds at the end; default: %(default)s")
    parser.add_argument("--photographs", type=int, default=500, help="number of JPEGs; default: %(default)s")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), flags.photographs)
        found = measure(flags, folder)
    threads = min(8, os.cpu_count() or 1)
    limit = limit_memory(
        flags.batch_size, image_bytes=3 * flags.resolution**2, workers=flags.workers, threads=threads
    ) + PROCESS_BYTES * (1 + flags.workers)
    print(
        f"batches of {flags.batch_size:,} images of {flags.resolution} px, "
        f"{f'{flags.workers} workers' if flags.workers else f'{threads} threads'}: the first after "
        f"{found['first']:.1f} s, then {found['rate']:,.0f} images/s, "
        f"{found['memory'] / 1e6:,.0f} MB (limit {limit / 1e6:,.0f})"
    )
    return 1 if found["memory"] > limit else 0


if __name__ == "__main__":
    sys.exit(main())
