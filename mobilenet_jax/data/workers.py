"""Worker processes that make arrays, and what happens when one of them is killed."""

import multiprocessing
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

Arrays = dict[str, np.ndarray]

IN_SHARED_MEMORY = 5  # elements of a worker at most, in Grain's queues and on the way into and out of them


class WorkerIterator(Iterator[Arrays]):
    """Iterates over make(number) for each number, which worker processes compute ahead of time, in order.

    The array that is called "images" comes in shared memory, which is freed with the array. It has a name that this
    process knows, so that what a killed worker leaves behind can be freed too.

    Args:
      make: makes arrays from a number; each worker gets a copy of it.
      numbers: the numbers, one after another.
      workers: the number of processes.
      ahead: the elements that each worker computes ahead, besides those in shared memory.
    """

    def __init__(self, make: Callable[[int], Arrays], numbers: range, *, workers: int, ahead: int):
        self._next, self._workers = numbers.start, workers
        self._prefix = f"mnj_{os.getpid()}_{secrets.token_hex(3)}_"  # macOS takes 30 characters with the number
        if not flags.FLAGS.is_parsed():
            # Grain's workers read absl flags, which are not parsed in a notebook or a test.
            flags.FLAGS.mark_as_parsed()
        made = grain.MapDataset.range(numbers.start, numbers.stop).map(_Numbered(make))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        shared = made.to_iter_dataset(options).map(_Share(self._prefix))
        # Grain would put the small arrays in shared memory too, under names of its own.
        shared = grain.experimental.WithOptionsIterDataset(
            shared, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        )
        processes = grain.MultiprocessingOptions(num_workers=workers)
        self._running = iter(shared.mp_prefetch(processes, worker_init_fn=_end_with_parent))

    def __next__(self) -> Arrays:
        try:
            arrays = next(self._running)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            self.close()
            self._free_blocks()
            code = str(error).partition("exit code ")[2].partition(".")[0]
            raise ChildProcessError(
                f"a worker of the loader was killed (exit code {code}), perhaps because memory ran out; fewer "
                "data.workers need less memory"
            ) from error
        self._next += 1
        return arrays

    def start_prefetch(self) -> None:
        """Start the workers, if they do not run yet."""
        self._running.start_prefetch()

    def close(self) -> None:
        """End the workers."""
        self._running.close()

    def _free_blocks(self) -> None:
        """Free the shared memory of the elements that a killed worker has made and nobody has received."""
        for number in range(self._next, self._next + (IN_SHARED_MEMORY + 1) * self._workers):
            try:
                block = shared_memory.SharedMemory(f"{self._prefix}{number}")
            except FileNotFoundError:  # never made, or freed
                continue
            block.close()
            try:
                block.unlink()
            except FileNotFoundError:
                # Grain's thread has freed it meanwhile. If it did before Python registered the block here, Python would
                # warn of a leak at the end. Only a block that is registered can be unregistered.
                resource_tracker.register(f"/{block.name}", "shared_memory")
                resource_tracker.unregister(f"/{block.name}", "shared_memory")


class _Numbered:
    """Makes arrays and keeps their number with them."""

    def __init__(self, make: Callable[[int], Arrays]):
        self._make = make

    def __call__(self, number: int) -> tuple[int, Arrays]:
        return number, self._make(number)


class _Share:
    """Moves images to a block of shared memory that is named by their number, in a worker."""

    def __init__(self, prefix: str):
        self._prefix = prefix

    def __call__(self, numbered: tuple[int, Arrays]) -> Arrays:
        number, arrays = numbered
        images = arrays["images"]
        block = shared_memory.SharedMemory(f"{self._prefix}{number}", create=True, size=images.nbytes)
        shared = SharedMemoryArray.from_shared_memory(block, images.shape, images.dtype)
        shared[...] = images
        return {**arrays, "images": shared}


def _end_with_parent(index: int, count: int) -> None:
    """End this worker when the process that started it is gone. Grain's workers would wait for it for ever."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
