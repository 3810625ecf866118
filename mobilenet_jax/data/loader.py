"""Batches for training and evaluation, on Grain.

Training is one endless stream of examples: position g of the stream is an image of epoch g // n, and its
augmentation is a function of the seed and g. A global batch is a slice of that stream and process p holds the
p-th block of it: neither the number of processes, nor of workers, nor a restart changes what is trained on.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from mobilenet_jax.data.decode import CroppableJpeg, UnreadableImageError, can_crop, decode_image, open_croppable
from mobilenet_jax.data.sources import Record, Source, eval_split, open_source
from mobilenet_jax.data.transforms import TrainTransform, make_eval_transform, make_train_transform

Batch = dict[str, np.ndarray]

# Of a set whose prepared images fit in this, each is kept once it has been met in the first epoch.
MEMORY_BYTES = 512 * 2**20
ON_ERROR = ("stop", "skip")


class _Reader:
    """Reads, decodes and prepares images by index, and keeps those of a small set in memory."""

    def __init__(self, source: Source, prepare: Callable[[np.ndarray], np.ndarray], *, keep: bool):
        self.source = source
        self._prepare, self._keep = prepare, keep
        self._kept: dict[int, tuple[np.ndarray, int]] = {}

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """The prepared image and the label; raises UnreadableImageError."""
        return self._kept[index] if index in self._kept else self._decode(index, self.source[index])

    def read_to_crop(self, index: int) -> tuple[np.ndarray | CroppableJpeg, int]:
        """As `read`, but a JPEG that is not to be kept is left encoded: of it a crop will be decoded alone."""
        if index in self._kept:
            return self._kept[index]
        record = self.source[index]
        if not isinstance(record.image, np.ndarray):
            jpeg = open_croppable(record.image, name=record.name)
            if jpeg is not None and not self._is_kept(math.prod(jpeg.shape)):
                return jpeg, record.label
        return self._decode(index, record)

    def _decode(self, index: int, record: Record) -> tuple[np.ndarray, int]:
        image, label, name = record
        if not isinstance(image, np.ndarray):
            image = decode_image(image, name=name)
        example = self._prepare(image), label
        if self._is_kept(example[0].nbytes):
            self._kept[index] = example
        return example

    def _is_kept(self, size: int) -> bool:
        # Each image judged by its own size: what is kept never exceeds the limit, with nothing to lock.
        return self._keep and size * len(self.source) <= MEMORY_BYTES


class _Untouched:
    """The transform of features, which are what they are."""

    crop = "none"

    def prepare(self, features: np.ndarray) -> np.ndarray:
        return features

    def augment(self, features: Any, rng: np.random.Generator) -> np.ndarray:
        del rng
        return features


@functools.lru_cache(maxsize=2)
def _draw_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's images; neighbouring epochs are both at hand where batches straddle them."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class _LoadTrainBatch:
    """The number of a training batch -> this process's block of it, augmented.

    One call makes a whole batch: Grain's own shuffling, mapping and batching cost a twentieth of a millisecond an
    image, a tenth of what the image itself takes.
    """

    def __init__(
        self,
        reader: _Reader,
        transform: TrainTransform | _Untouched,
        *,
        on_error: str,
        seed: int,
        local_size: int,
        process_index: int,
        process_count: int,
    ):
        self._reader, self._transform, self._on_error, self._seed = reader, transform, on_error, seed
        self._local_size, self._process_index, self._process_count = local_size, process_index, process_count
        self._read = reader.read_to_crop if transform.crop == "inception" else reader.read
        self._reported: set[str] = set()

    def __call__(self, step: int) -> Batch:
        start = (step * self._process_count + self._process_index) * self._local_size
        images, labels, skipped = zip(*map(self._make_example, range(start, start + self._local_size)), strict=True)
        return {
            "images": np.stack(images),
            "labels": np.array(labels, np.int32),
            "skipped": np.array(skipped, np.int32),
        }

    def _make_example(self, place: int) -> tuple[np.ndarray, int, int]:
        """The example at a place of the stream."""
        count = len(self._reader.source)
        epoch, i = divmod(place, count)
        # A stream of 2^64 blocks of numbers for each place, and one key for all.
        rng = np.random.Generator(np.random.Philox(key=self._seed, counter=(0, place, 0, 0)))
        return self._read_and_augment(int(_draw_order(count, self._seed, epoch)[i]), rng)

    def _read_and_augment(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
        """Image, label, and how many unreadable images before it were passed over."""
        count = len(self._reader.source)
        for skipped in range(count):
            try:
                image, label = self._read((index + skipped) % count)
                return self._transform.augment(image, rng), label, skipped
            except UnreadableImageError as error:
                if self._on_error == "stop":
                    raise
                if str(error) not in self._reported:
                    self._reported.add(str(error))
                    logging.warning("Skipped: %s", error)
        raise UnreadableImageError(f"None of the {count} images of {self._reader.source.name} can be read.")


class TrainIterator(grain.DatasetIterator[Batch]):
    """An endless iterator of batches whose state is that of the last batch it gave, whatever runs ahead.

    The state is a count: the batches can be had from any position on, so a restored iterator starts its
    threads or workers there, and one saved with workers continues without them.
    """

    def __init__(self, batches: grain.MapDataset, *, workers: int, threads: int, identity: dict[str, int]):
        super().__init__()
        self._batches, self._workers, self._threads, self._identity = batches, workers, threads, identity
        self._next_batch = 0
        self._running: grain.DatasetIterator | None = None
        self._closed = False

    def __next__(self) -> Batch:
        batch = next(self._start())
        self._next_batch += 1
        return batch

    def start_prefetch(self) -> None:
        """Starts the threads or the workers, if they do not run yet."""
        self._start().start_prefetch()

    def _start(self) -> grain.DatasetIterator:
        if self._closed:
            raise ValueError("The data iterator is closed.")
        if self._running is None:
            remaining = self._batches.slice(slice(self._next_batch, None))
            self._running = iter(_prefetch(remaining, workers=self._workers, threads=self._threads))
        return self._running

    def get_state(self) -> dict[str, int]:
        """The number of batches given so far and what they were made of, as JSON."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a state of `get_state`, which may be that of another process of the same run.

        Raises:
          ValueError: a state from other data, which would silently be another stream.
        """
        for key, value in self._identity.items():
            if state[key] != value:
                raise ValueError(
                    f"The data iterator was saved with {key} = {state[key]} and now has {key} = {value}: the "
                    "batches that follow would not be those of the run."
                )
        self._stop()
        self._next_batch = state["next_batch"]

    def close(self) -> None:
        """Ends threads and workers; the iterator gives no more batches."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def make_train_iterator(
    data_config, *, seed: int, process_index: int, process_count: int, features: Source | None = None
) -> TrainIterator:
    """Training batches without end: every image once an epoch, in an order drawn anew for each.

    Args:
      data_config: config.data of configs/base.py.
      seed: of order and augmentation; any integer from 0 on.
      process_index: which block of each global batch is wanted.
      process_count: how many blocks a global batch has. It does not change the global batch.
      features: arrays in memory that stand for the images, one for each, and are given as they are.

    Returns:
      A Grain iterator of {"images": uint8[b, S, S, 3], "labels": int32[b], "skipped": int32[b]} with b =
      batch_size / process_count; `skipped` counts the unreadable images that an example stands in for. Its
      state is exact (see TrainIterator). With data.on_error = "stop", next() raises UnreadableImageError at
      such an image.

    Raises:
      ValueError: an impossible config, in one sentence.
    """
    _check(data_config)
    local_size = _divide(data_config, "batch_size", process_count)
    transform = _Untouched() if features else make_train_transform(data_config)
    source = features or open_source(data_config, "train")
    workers = 0 if features else data_config.workers
    if transform.crop == "inception" and not isinstance(source[0].image, np.ndarray) and not can_crop():
        logging.warning(
            "JPEGs are decoded whole, at half the speed: the installation found no C compiler or no headers of "
            "libjpeg-turbo, with which it builds mobilenet_jax.data._jpeg."
        )
    load_batch = _LoadTrainBatch(
        _Reader(source, transform.prepare, keep=workers == 0 and not features),
        transform,
        on_error=data_config.on_error,
        seed=seed,
        local_size=local_size,
        process_index=process_index,
        process_count=process_count,
    )
    return TrainIterator(
        grain.MapDataset.range(sys.maxsize).map(load_batch),
        workers=workers,
        threads=_count_threads(source, workers=workers),
        identity={"images": len(source), "batch_size": data_config.batch_size, "seed": seed},
    )


class _LoadEvalBatch:
    """The number of an evaluation batch -> this process's block of it, padded and masked."""

    def __init__(self, reader: _Reader, *, local_size: int, process_index: int, process_count: int, blank: np.ndarray):
        self._reader, self._local_size, self._blank = reader, local_size, blank
        self._process_index, self._process_count = process_index, process_count

    def __call__(self, step: int) -> Batch:
        batch = {
            "images": np.stack([self._blank] * self._local_size),
            "labels": np.zeros(self._local_size, np.int32),
            "mask": np.zeros(self._local_size, bool),
        }
        start = (step * self._process_count + self._process_index) * self._local_size
        for row, index in enumerate(range(start, min(start + self._local_size, len(self._reader.source)))):
            batch["images"][row], batch["labels"][row] = self._reader.read(index)
            batch["mask"][row] = True
        return batch


class EvalBatches:
    """The evaluation batches of one process; can be iterated any number of times."""

    def __init__(self, batches: grain.MapDataset, *, workers: int, threads: int):
        self._batches, self._workers, self._threads = batches, workers, threads

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        running = iter(_prefetch(self._batches, workers=self._workers, threads=self._threads))
        try:
            yield from running
        finally:
            running.close()


def make_eval_batches(
    data_config, *, process_index: int, process_count: int, split: str | None = None, features: Source | None = None
) -> tuple[EvalBatches, int]:
    """Every image of a split exactly once over all processes, whatever the batch size, in the order of its source.

    Args:
      data_config: config.data of configs/base.py.
      process_index: which block of each global batch is wanted.
      process_count: how many blocks a global batch has.
      split: by default that of evaluation: holdout where data.holdout > 0, else test.
      features: arrays in memory that stand for the images, and are given as they are.

    Returns:
      The batches {"images": uint8[b, S, S, 3], "labels": int32[b], "mask": bool[b]}, b = eval_batch_size /
      process_count, as many in every process, zeros where mask is False; and the count of images in the
      split, over all processes. Iterating raises UnreadableImageError at an unreadable image, whatever
      data.on_error is.

    Raises:
      ValueError: an impossible config, in one sentence.
    """
    _check(data_config)
    local_size = _divide(data_config, "eval_batch_size", process_count)
    source = features or open_source(data_config, split or eval_split(data_config))
    workers = 0 if features else data_config.workers
    # What is not evaluated again and again is not kept.
    keep = workers == 0 and not features and split is None
    reader = _Reader(source, _Untouched().prepare if features else make_eval_transform(data_config), keep=keep)
    blank = np.zeros((data_config.image_size, data_config.image_size, 3), np.uint8)
    load = _LoadEvalBatch(
        reader,
        local_size=local_size,
        process_index=process_index,
        process_count=process_count,
        blank=np.zeros_like(features[0].image) if features else blank,
    )
    batches = grain.MapDataset.range(math.ceil(len(source) / data_config.eval_batch_size)).map(load)
    threads = _count_threads(source, workers=workers)
    return EvalBatches(batches, workers=workers, threads=threads), len(source)


def _prefetch(batches: grain.MapDataset, *, workers: int, threads: int) -> grain.IterDataset:
    """Batches made ahead, each whole by one thread, in order."""
    if workers and not flags.FLAGS.is_parsed():
        # Grain's workers read absl flags, which nobody has parsed in a notebook or a test.
        flags.FLAGS.mark_as_parsed()
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    prefetched = batches.to_iter_dataset(ahead)
    if not workers:
        return prefetched
    return prefetched.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)).map(_copy)


def _copy(batch: Batch) -> Batch:
    """Takes a worker's batch out of shared memory, which leaks where a batch outlives the iterator."""
    return {key: np.array(value) for key, value in batch.items()}


def _count_threads(source: Source, *, workers: int) -> int:
    """Threads of each process that reads."""
    # Encoded images gain from threads, as Pillow decodes without the interpreter's lock; arrays would only
    # contend.
    return 1 if workers or isinstance(source[0].image, np.ndarray) else min(8, os.cpu_count() or 1)


def _divide(data_config, key: str, process_count: int) -> int:
    size = data_config[key]
    if size < 1 or size % process_count:
        raise ValueError(f"data.{key} is {size!r}; it must be a positive multiple of the {process_count} processes.")
    return size // process_count


def _check(data_config) -> None:
    if data_config.on_error not in ON_ERROR:
        raise ValueError(f"data.on_error is {data_config.on_error!r}; it must be one of {', '.join(ON_ERROR)}.")
    if data_config.workers < 0:
        raise ValueError(f"data.workers is {data_config.workers!r}; it must be at least 0.")
