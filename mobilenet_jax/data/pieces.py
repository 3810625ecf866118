"""Batches made ahead of time, in pieces of at most 64 images, by threads or by worker processes.

A batch of one host may have thousands of images. If one thread made all of it, the first batch would take as long as
one thread needs, and the threads together would hold many batches. So a thread or a worker makes a piece at a time, and
the pieces of a batch meet in one array. Threads write into this array, and the pieces of workers are copied into it
from shared memory: no image is copied only because its batch has pieces.
"""

import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from mobilenet_jax.data.workers import WorkerIterator

Batch = dict[str, np.ndarray]

# Images. With the pieces of 64 images, Grain's own cost of a twentieth of a millisecond for each piece does not count.
PIECE = 64
_AHEAD = 2  # pieces that each thread has ready or in work, if a batch has fewer


class BatchMaker(Protocol):
    """Makes this process's rows of each batch. Threads share a maker, and workers get a copy of it."""

    size: int  # rows of this process in each batch

    def allocate(self, rows: int) -> Batch:
        """Return arrays of that many rows; their values may be anything."""
        ...

    def fill(self, step: int, rows: range, out: Batch) -> None:
        """Write these rows of this process's part of batch `step` into `out`, which has len(rows) rows."""
        ...


class BatchIterator(Iterator[Batch]):
    """Iterates over the batches start, start + 1, ..., stop - 1, which are made ahead of time. Close it after use.

    With threads, this holds the batch that is next, and one batch more or as many as have two pieces for each thread.
    With workers, it holds one batch here, and all workers together hold one batch and up to 8 pieces each.

    Args:
      maker: makes the rows.
      start: the first batch.
      stop: the end; none: there is no end.
      workers: the number of worker processes; 0: threads of this process.
      threads: the number of threads, without workers; a worker has one.
    """

    def __init__(self, maker: BatchMaker, *, start: int, stop: int | None = None, workers: int, threads: int):
        self._maker, self._next, self._filled = maker, start, None if workers else _FilledBatches(maker)
        self._pieces = divide(maker.size)
        count = len(self._pieces)
        numbers = range(start * count, sys.maxsize if stop is None else stop * count)
        self._running: Any
        if self._filled:
            pieces = grain.MapDataset.range(numbers.start, numbers.stop).map(self._filled.fill)
            ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(_AHEAD * threads, count))
            self._running = iter(pieces.to_iter_dataset(ahead))
        else:
            ahead = max(_AHEAD, -(-count // workers))
            self._running = WorkerIterator(_MakePiece(maker), numbers, workers=workers, ahead=ahead)

    def __next__(self) -> Batch:
        if self._filled:
            for _ in self._pieces:
                next(self._running)
            batch = self._filled.take(self._next)
        else:
            batch = self._collect()
        self._next += 1
        return batch

    def _collect(self) -> Batch:
        """Return a batch of pieces that workers made. A piece in shared memory would leak if it outlived its worker."""
        first = next(self._running)  # raises StopIteration at the end
        batch = self._maker.allocate(self._maker.size)
        for rows in self._pieces:
            piece = next(self._running) if rows.start else first
            for name, array in batch.items():
                array[rows.start : rows.stop] = piece[name]
        return batch

    def start_prefetch(self) -> None:
        """Start the threads or the workers, if they do not run yet."""
        self._running.start_prefetch()

    def close(self) -> None:
        """End threads and workers."""
        self._running.close()


def divide(size: int) -> list[range]:
    """Return the rows of each piece of a batch of `size` rows: as few pieces as PIECE allows, as equal as possible."""
    count = -(-size // PIECE)
    return [range(i * size // count, (i + 1) * size // count) for i in range(count)]


class _FilledBatches:
    """The batches whose pieces threads write."""

    def __init__(self, maker: BatchMaker):
        self._maker, self._pieces = maker, divide(maker.size)
        self._batches: dict[int, Batch] = {}
        self._lock = threading.Lock()

    def fill(self, number: int) -> int:
        """Write a piece into its batch; return its number, because Grain drops an element that is None."""
        step, piece = divmod(number, len(self._pieces))
        with self._lock:
            if step not in self._batches:
                self._batches[step] = self._maker.allocate(self._maker.size)
            batch = self._batches[step]
        rows = self._pieces[piece]
        self._maker.fill(step, rows, {name: array[rows.start : rows.stop] for name, array in batch.items()})
        return number

    def take(self, step: int) -> Batch:
        """Return a batch whose pieces are all written, and forget it."""
        with self._lock:
            return self._batches.pop(step)


class _MakePiece:
    """Makes a piece in arrays of its own, in a worker."""

    def __init__(self, maker: BatchMaker):
        self._maker, self._pieces = maker, divide(maker.size)

    def __call__(self, number: int) -> Batch:
        step, piece = divmod(number, len(self._pieces))
        out = self._maker.allocate(len(self._pieces[piece]))
        self._maker.fill(step, self._pieces[piece], out)
        return out
