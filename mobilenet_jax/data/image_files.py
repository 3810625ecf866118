"""Image files: found in folders, and read in batches of one shape."""

import functools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mobilenet_jax.data.decode import UnreadableImageError, decode_scaled
from mobilenet_jax.data.folders import SUFFIXES, is_image
from mobilenet_jax.data.transforms import EvalTransform


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return `paths` with every folder replaced by the images in it, at any depth, sorted by name.

    In folders, images are the files ending in .jpg, .jpeg, .png or .webp, and links to folders are not followed. Any
    other path is returned as it is. Raises ValueError for a folder without images and
    for a URL, OSError for one that cannot be read.
    """

    def refuse(error: OSError):
        raise error

    files = []
    for path in map(Path, paths):
        if re.match(r"[a-z][a-z0-9]+:/", str(path)):  # pathlib keeps one slash of two
            raise ValueError(f"{path.as_posix().replace(':/', '://', 1)} is a URL; valid: images on a disk")
        if not os.path.isdir(path):
            files.append(path)
            continue
        before = len(files)
        for folder, subfolders, names in os.walk(path, onerror=refuse):
            subfolders.sort()
            files += [file for file in map(Path(folder).joinpath, sorted(names)) if is_image(file)]
        if len(files) == before:
            raise ValueError(f"{path} holds no image; valid: files ending in {', '.join(SUFFIXES)}")
    if not files:
        raise ValueError("there are no images; give files or folders")
    return files


def read_batches(
    files: list[Path], transform: EvalTransform, *, batch_size: int
) -> Iterator[tuple[list[Path], list[str | None], np.ndarray]]:
    """Yield (files, errors, images): at most `batch_size` files, and images uint8 [batch_size, S, S, 3].

    An error says why a file cannot be read; it is None for a file that was read. Rows without an image are black. The
    next batch is read by threads while the caller works on one.
    """
    size, starts = transform.image_size, range(0, len(files), batch_size)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def begin(start: int) -> tuple[list[Path], np.ndarray, Iterator[str | None]]:
            paths, images = files[start : start + batch_size], np.zeros((batch_size, size, size, 3), np.uint8)
            return paths, images, pool.map(functools.partial(_read, transform=transform), paths, images)

        following = begin(0)
        for start in starts:
            paths, images, errors = following
            found = list(errors)
            if start + batch_size < len(files):
                following = begin(start + batch_size)
            yield paths, found, images


def _read(path: Path, row: np.ndarray, *, transform: EvalTransform) -> str | None:
    """Fill a row of a batch; return the error if the image cannot be read."""
    try:
        row[:] = transform(*decode_scaled(path, name=str(path), least_side=transform.least_side))
    except UnreadableImageError as error:
        return " ".join(str(error).splitlines())
    return None
