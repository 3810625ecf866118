"""Training images as JPEGs of the size that random crops need, kept in memory: data.cache = "resized".

The idea is that of FFCV (Leclerc et al. 2023): a photograph has many more pixels than its crop, so decoding a smaller
copy takes a fraction of the time, and encoded copies take a tenth of the memory of their pixels.
"""

import functools
import io
import threading
from collections.abc import Callable

import numpy as np
from absl import logging
from PIL import Image

from mobilenet_jax.data.decode import OVERSAMPLING, CroppableJpeg, decode_scaled, open_croppable
from mobilenet_jax.data.sources import Record, Source
from mobilenet_jax.data.transforms import TrainTransform

_SIDES = 2  # the shorter side of a copy over data.image_size
_QUALITY = 95  # of the JPEG, without subsampling of the chroma
_LONGEST = 65_500  # pixels of a side, libjpeg's limit
_OVERHEAD = 600  # bytes that Python takes for an image beside its data


class ResizedImages:
    """Reads the images of a source, which are encoded, as small JPEGs, and keeps as many of these as fit in memory.

    A copy has the same pixels whenever it is made, so it does not matter which images are kept. The pixels of a crop
    differ from those of the same part of the original by 1.5 grey levels in the mean, in photographs (the tests measure
    it). Threads may share this. A worker process that gets a copy of it begins with none.

    Args:
      source: the images.
      transform: what is done to them. The shorter side of a copy has at most twice as many pixels as a crop. Copies are
        made with the kernel of the crops, bilinear or bicubic. With decode="fast", the originals are decoded so too.
      limit: bytes of memory.
    """

    def __init__(self, source: Source, transform: TrainTransform, *, limit: int):
        self.source, self._transform, self._limit = source, transform, limit
        self._side = _SIDES * transform.image_size
        self._kept: dict[int, tuple[CroppableJpeg, int]] = {}
        self._bytes, self._is_closed = 0, False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return functools.partial(ResizedImages, limit=self._limit), (self.source, self._transform)

    def read(self, index: int) -> tuple[CroppableJpeg, int]:
        """Return the JPEG and the label of an image; raise UnreadableImageError if the image cannot be read."""
        if index in self._kept:
            return self._kept[index]
        record = self.source[index]
        example = self._shrink(record), record.label
        self._keep(index, example)
        return example

    def _shrink(self, record: Record) -> CroppableJpeg:
        """Return an image as an upright JPEG of three channels or grey, at most as large as wanted.

        A JPEG that is so already is returned as it is.
        """
        data, _, name = record
        assert not isinstance(data, np.ndarray)
        jpeg = open_croppable(data, name=name, or_whole=True)
        if jpeg is not None and jpeg.plain and min(jpeg.shape[:2]) <= self._side:
            return jpeg
        least_side = OVERSAMPLING * self._side if self._transform.decode == "fast" else None
        pixels, extent = decode_scaled(data, name=name, least_side=least_side)
        left, top, right, bottom = extent or (0, 0, pixels.shape[1], pixels.shape[0])
        width, height = right - left, bottom - top
        scale = min(1, self._side / min(height, width), _LONGEST / max(height, width))
        image = Image.fromarray(pixels)
        if scale < 1:
            resample = (
                Image.Resampling.BICUBIC if self._transform.interpolation == "bicubic" else Image.Resampling.BILINEAR
            )
            image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample, box=extent)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY, subsampling="4:4:4")
        copy = open_croppable(file.getvalue(), name=name, or_whole=True)
        assert copy is not None
        return copy

    def _keep(self, index: int, example: tuple[CroppableJpeg, int]) -> None:
        """Keep an image unless one did not fit before; say once how many fit."""
        size = len(example[0].data) + _OVERHEAD
        with self._lock:
            if self._is_closed or index in self._kept:
                return
            self._is_closed = self._bytes + size > self._limit
            if not self._is_closed:
                self._kept[index] = example
                self._bytes += size
            kept, count = len(self._kept), len(self.source)
            if self._is_closed or kept == count:
                others = "" if kept == count else "; the others are made each time they are read"
                logging.info("data.cache keeps %d of %d images (%.1f MB)%s", kept, count, self._bytes / 1e6, others)
