"""The images of an export: real ones for calibration and comparison, or random pixels."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mobilenet_jax.cli.config import apply_preprocessing, load_config
from mobilenet_jax.data.decode import UnreadableImageError, decode_image
from mobilenet_jax.data.image_files import list_images
from mobilenet_jax.data.sources import open_source
from mobilenet_jax.data.transforms import EvalTransform
from mobilenet_jax.weights.card import Preprocessing, read_preprocessing

_CONFIG = re.compile(r".+\.py(:\w+)?")


class Images(NamedTuple):
    """Prepared images and where they come from."""

    pixels: np.ndarray  # uint8 [N, S, S, 3]
    source: str


def draw_images(given: Preprocessing, *, count: int, seed: int = 0) -> Images:
    """Return images of random pixels."""
    shape = (count, given.image_size, given.image_size, 3)
    return Images(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8), "images of random pixels")


def read_images(where: str, card: dict, *, count: int) -> Images:
    """Read at most `count` images, spread evenly over those there are, prepared as the card says.

    Args:
      where: a folder of images, or a config file with its argument, as configs/v2.py:digits, whose training images
        are read.
      card: of the weights.
      count: see above.

    Raises:
      ValueError, OSError: images or data that cannot be opened or read.
    """
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    transform = EvalTransform(given.image_size, given.crop_share, given.interpolation, given.squash)
    records: Sequence[tuple[Any, str]]
    if _CONFIG.fullmatch(where):
        config: Any = load_config(where, [])
        apply_preprocessing(config, card, [])
        source = open_source(config.data, "train")
        records = [(source[i].image, source[i].name) for i in _spread(len(source), count)]
        name = f"training images of {where}"
    else:
        files = list_images([where])
        records = [(files[i], str(files[i])) for i in _spread(len(files), count)]
        name = f"images of {where}"
    return Images(np.stack([transform(_decode(image, name)) for image, name in records]), name)


def _spread(total: int, count: int) -> list[int]:
    return [int(i) for i in np.linspace(0, total - 1, min(total, count))]


def _decode(image: Any, name: str) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    try:
        return decode_image(image, name=name)
    except UnreadableImageError as error:
        raise ValueError(" ".join(str(error).splitlines())) from error
