"""The check of a data set: every image is read once, and the bad ones are reported."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mobilenet_jax.data.decode import UnreadableImageError, decode_image
from mobilenet_jax.data.sources import Source

_AT_ONCE = 256  # images that wait for a thread; a list of all would be long


def read_all(source: Source) -> Iterator[str | None]:
    """Read and decode every image of a source; yield, in order, why it cannot be read, or None."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(source), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(source)))
            yield from pool.map(lambda index: _find_problem(source, index), indices)


def _find_problem(source: Source, index: int) -> str | None:
    try:
        image, _, name = source[index]
        if not isinstance(image, np.ndarray):
            decode_image(image, name=name)
    except UnreadableImageError as error:
        return " ".join(str(error).splitlines())
    return None
