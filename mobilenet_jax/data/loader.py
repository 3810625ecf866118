"""Batches for training and evaluation, on Grain.

Training is one endless stream of examples. Position g of the stream is an image of epoch g // n, where n is the number
of images, and its augmentation depends only on the seed and g. A global batch is a slice of that stream, and process p
holds the p-th block of the slice. So the examples do not depend on the number of processes or workers, or on restarts.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import logging

from mobilenet_jax.data.cache import ResizedImages
from mobilenet_jax.data.decode import CroppableJpeg, UnreadableImageError, can_crop, decode_scaled, open_croppable
from mobilenet_jax.data.pieces import Batch, BatchIterator
from mobilenet_jax.data.sources import Record, Source, eval_split, is_encoded, open_source
from mobilenet_jax.data.transforms import EvalTransform, TrainTransform, make_eval_transform, make_train_transform

# A data set whose prepared images fit in this stays in memory after its first epoch. Each worker has its own copy, and
# all copies together must fit.
MEMORY_BYTES = 512 * 2**20
ON_ERROR = ("stop", "skip")


class _Reader:
    """Reads, decodes and prepares images by index, and keeps the images of a small set in memory.

    The transform says how images are prepared, and which pixels that needs. `copies` is the number of processes that
    keep images; 0: none does.
    """

    def __init__(self, source: Source, transform: "TrainTransform | EvalTransform | _Identity", *, copies: int):
        self.source, self._transform, self._copies = source, transform, copies
        self._kept: dict[int, tuple[np.ndarray, int]] = {}

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Return the prepared image and the label; raise UnreadableImageError if the image cannot be read."""
        return self._kept[index] if index in self._kept else self._decode(index, self.source[index])

    def read_to_crop(self, index: int) -> tuple[np.ndarray | CroppableJpeg, int]:
        """Read as `read`, but leave a JPEG encoded if it is not kept, so that only a crop of it is decoded."""
        if index in self._kept:
            return self._kept[index]
        record = self.source[index]
        if not isinstance(record.image, np.ndarray):
            jpeg = open_croppable(record.image, name=record.name, or_whole=self._transform.scaled_from is not None)
            if jpeg is not None and (self._is_scaled(jpeg) or not self._is_kept(math.prod(jpeg.shape))):
                return jpeg, record.label
        return self._decode(index, record)

    def _decode(self, index: int, record: Record) -> tuple[np.ndarray, int]:
        image, label, name = record
        extent = None
        if not isinstance(image, np.ndarray):
            image, extent = decode_scaled(image, name=name, least_side=self._transform.least_side)
        example = self._transform.prepare(image, extent), label
        if self._is_kept(example[0].nbytes):
            self._kept[index] = example
        return example

    def _is_scaled(self, jpeg: CroppableJpeg) -> bool:
        least = self._transform.scaled_from
        return least is not None and min(jpeg.shape[:2]) >= least

    def _is_kept(self, size: int) -> bool:
        # Each image is judged by its own size, so that the limit holds without a lock and a running total.
        return self._copies > 0 and size * len(self.source) * self._copies <= MEMORY_BYTES


class _Identity:
    """The transform of features, which are neither prepared nor augmented."""

    crop, least_side, scaled_from = "none", None, None

    def prepare(self, features: np.ndarray, extent: Any = None) -> np.ndarray:
        del extent
        return features

    def augment(self, features: Any, rng: np.random.Generator) -> np.ndarray:
        del rng
        return features


@functools.lru_cache(maxsize=2)
def _draw_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the order of an epoch's images; two epochs are cached, because a batch may have images of both."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class _TrainMaker:
    """Makes the rows of this process in training batches."""

    def __init__(
        self,
        source: Source,
        read: Callable[[int], tuple[Any, int]],
        transform: TrainTransform | _Identity,
        *,
        blank: np.ndarray,
        on_error: str,
        seed: int,
        size: int,
        process_index: int,
        process_count: int,
    ):
        self.size = size
        self._source, self._read, self._transform, self._blank = source, read, transform, blank
        self._on_error, self._seed = on_error, seed
        self._process_index, self._process_count = process_index, process_count
        self._reported: set[str] = set()

    def allocate(self, rows: int) -> Batch:
        return {**_allocate(rows, self._blank), "skipped": np.empty(rows, np.int32)}

    def fill(self, step: int, rows: range, out: Batch) -> None:
        start = (step * self._process_count + self._process_index) * self.size
        for i, row in enumerate(rows):
            out["images"][i], out["labels"][i], out["skipped"][i] = self._make_example(start + row)

    def _make_example(self, place: int) -> tuple[np.ndarray, int, int]:
        """Return the image, the label and the number of skipped images at a place of the stream."""
        count = len(self._source)
        epoch, i = divmod(place, count)
        # All places have the same key; the counter gives each place 2^64 blocks of random numbers of its own.
        rng = np.random.Generator(np.random.Philox(key=self._seed, counter=(0, place, 0, 0)))
        return self._read_and_augment(int(_draw_order(count, self._seed, epoch)[i]), rng)

    def _read_and_augment(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
        """Return the first readable image from `index` on, its label, and how many images were skipped before it."""
        count = len(self._source)
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
        raise UnreadableImageError(f"none of the {count} images of {self._source.name} can be read")


class TrainIterator(grain.DatasetIterator[Batch]):
    """An endless iterator of batches; its state is the position after the last batch it returned.

    Prefetched batches do not count. The state is a number of batches, so that a restored iterator starts its threads or
    workers at that position. An iterator that was saved with workers can continue without them.
    """

    def __init__(self, maker: _TrainMaker, *, workers: int, threads: int, identity: dict[str, int]):
        super().__init__()
        self._maker, self._workers, self._threads, self._identity = maker, workers, threads, identity
        self._next_batch = 0
        self._running: BatchIterator | None = None
        self._closed = False

    def __next__(self) -> Batch:
        try:
            batch = next(self._start())
        except Exception:
            self._stop()  # another call starts with the same batch
            raise
        self._next_batch += 1
        return batch

    def start_prefetch(self) -> None:
        """Start the threads or the workers, if they do not run yet."""
        self._start().start_prefetch()

    def _start(self) -> BatchIterator:
        if self._closed:
            raise ValueError("the data iterator is closed")
        if self._running is None:
            self._running = BatchIterator(
                self._maker, start=self._next_batch, workers=self._workers, threads=self._threads
            )
        return self._running

    def get_state(self) -> dict[str, int]:
        """Return the number of batches so far and the identity of their data, as JSON."""
        return {"next_batch": self._next_batch, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue from a state of `get_state`, which may come from another process of the same run.

        Raises:
          ValueError: the state is from other data, whose stream is different.
        """
        for key, value in self._identity.items():
            if state[key] != value:
                raise ValueError(
                    f"the data iterator was saved with {key} = {state[key]} and now has {key} = {value}; valid: the "
                    "data with which the run began"
                )
        self._stop()
        self._next_batch = state["next_batch"]

    def close(self) -> None:
        """End threads and workers; the iterator returns no more batches."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def make_train_iterator(
    data_config,
    *,
    seed: int,
    process_index: int,
    process_count: int,
    source: Source | None = None,
    features: Source | None = None,
) -> TrainIterator:
    """Make an endless iterator of training batches: every image once an epoch, in an order drawn for the epoch.

    Args:
      data_config: config.data of configs/base.py.
      seed: an integer of at least 0, for order and augmentation.
      process_index: the number of this process's block in each global batch.
      process_count: the number of blocks in a global batch. It does not change the global batch.
      source: the training images, if they are open; otherwise they are opened here.
      features: arrays in memory, one for each image, that replace the images and are not transformed.

    Returns:
      A Grain iterator of {"images": uint8[b, S, S, 3], "labels": int32[b], "skipped": int32[b]} with b =
      batch_size / process_count. `skipped` counts the unreadable images that an example replaces. The state is exact
      (see TrainIterator). With data.on_error = "stop", next() raises UnreadableImageError at an unreadable image.
      next() raises ChildProcessError if a worker was killed.

    Raises:
      ValueError, FileNotFoundError: a source that `open_source` refuses.
    """
    transform = _Identity() if features else make_train_transform(data_config)
    source = features or source or open_source(data_config, "train")
    workers = 0 if features else data_config.workers
    if transform.crop == "inception" and is_encoded(source) and not can_crop():
        logging.warning(
            "JPEGs are decoded whole, at half the speed: mobilenet_jax.data._jpeg was not built, because the "
            "installation found no C compiler or no headers of libjpeg-turbo"
        )
    maker = _TrainMaker(
        source,
        _choose_reader(source, transform, copies=0 if features else max(1, workers)),
        transform,
        blank=_make_blank(data_config, features),
        on_error=data_config.on_error,
        seed=seed,
        size=data_config.batch_size // process_count,
        process_index=process_index,
        process_count=process_count,
    )
    return TrainIterator(
        maker,
        workers=workers,
        threads=_count_threads(source),
        identity={"images": len(source), "batch_size": data_config.batch_size, "seed": seed},
    )


def _choose_reader(source: Source, transform: TrainTransform | _Identity, *, copies: int) -> Callable:
    """Return the function of an index that reads a training image and its label; `copies` processes keep images."""
    reader = _Reader(source, transform, copies=copies)
    if transform.crop != "inception":
        return reader.read
    if isinstance(transform, TrainTransform) and transform.cache and is_encoded(source):
        return ResizedImages(source, transform, limit=MEMORY_BYTES // copies).read
    return reader.read_to_crop


class _EvalMaker:
    """Makes the rows of this process in evaluation batches; rows after the last image are zeros, with mask False."""

    def __init__(self, reader: _Reader, *, blank: np.ndarray, size: int, process_index: int, process_count: int):
        self.size = size
        self._reader, self._blank = reader, blank
        self._process_index, self._process_count = process_index, process_count

    def allocate(self, rows: int) -> Batch:
        return {**_allocate(rows, self._blank), "mask": np.empty(rows, bool)}

    def fill(self, step: int, rows: range, out: Batch) -> None:
        start = (step * self._process_count + self._process_index) * self.size
        count = len(self._reader.source)
        for i, row in enumerate(rows):
            out["mask"][i] = start + row < count
            out["images"][i], out["labels"][i] = self._reader.read(start + row) if out["mask"][i] else (0, 0)


def _allocate(rows: int, blank: np.ndarray) -> Batch:
    """Return arrays for that many images, each like `blank`, and their labels."""
    return {"images": np.empty((rows, *blank.shape), blank.dtype), "labels": np.empty(rows, np.int32)}


def _make_blank(data_config, features: Source | None) -> np.ndarray:
    """Return an array of the shape and type of one prepared image, or of one feature vector."""
    if features:
        return np.zeros_like(features[0].image)
    return np.zeros((data_config.image_size, data_config.image_size, 3), np.uint8)


class EvalBatches:
    """The evaluation batches of one process, which can be iterated any number of times."""

    def __init__(self, maker: _EvalMaker, count: int, *, workers: int, threads: int):
        self._maker, self._count, self._workers, self._threads = maker, count, workers, threads

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        running = BatchIterator(self._maker, start=0, stop=self._count, workers=self._workers, threads=self._threads)
        with contextlib.closing(running):
            yield from running


def make_eval_batches(
    data_config,
    *,
    process_index: int,
    process_count: int,
    device_count: int = 1,
    split: str | None = None,
    source: Source | None = None,
    features: Source | None = None,
) -> tuple[EvalBatches, int]:
    """Make batches with every image of a split exactly once over all processes, in the order of the source.

    Args:
      data_config: config.data of configs/base.py.
      process_index: the number of this process's block in each global batch.
      process_count: the number of blocks in a global batch.
      device_count: the number of devices over all processes, which share each batch equally.
      split: train, test or holdout; by default holdout if data.holdout > 0, otherwise test.
      source: the images of the split, if they are open; otherwise they are opened here.
      features: arrays in memory, one for each image, that replace the images and are not transformed.

    Returns:
      (batches, the number of images in the split over all processes). A batch is {"images": uint8[b, S, S, 3],
      "labels": int32[b], "mask": bool[b]}, with zeros where mask is False. Here b * process_count is
      eval_batch_size, rounded up to a multiple of the devices and of the processes.
      Every process has the same number of batches. Iterating raises UnreadableImageError at an unreadable image, also
      with data.on_error = "skip".

    Raises:
      ValueError, FileNotFoundError: a source that `open_source` refuses.
    """
    size = _round_up(data_config.eval_batch_size, math.lcm(device_count, process_count))
    source = features or source or open_source(data_config, split or eval_split(data_config))
    workers = 0 if features else data_config.workers
    # Only the split of evaluation is read more than once, and workers end with each reading.
    copies = int(workers == 0 and not features and split is None)
    reader = _Reader(source, _Identity() if features else make_eval_transform(data_config), copies=copies)
    maker = _EvalMaker(
        reader,
        blank=_make_blank(data_config, features),
        size=size // process_count,
        process_index=process_index,
        process_count=process_count,
    )
    threads = _count_threads(source)
    return EvalBatches(maker, math.ceil(len(source) / size), workers=workers, threads=threads), len(source)


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor


def _count_threads(source: Source) -> int:
    """Return the number of threads that make batches if no workers do."""
    # Pillow decodes without the interpreter's lock, so threads help with encoded images. With arrays they do not.
    return min(8, os.cpu_count() or 1) if is_encoded(source) else 1
