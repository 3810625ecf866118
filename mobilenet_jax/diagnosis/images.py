"""The images of a diagnosis: files and folders, or the evaluation set of a config."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mobilenet_jax.cli.config import apply_preprocessing, load_config
from mobilenet_jax.data.decode import UnreadableImageError
from mobilenet_jax.data.image_files import list_images, read_batches
from mobilenet_jax.data.loader import Batch, make_eval_batches
from mobilenet_jax.data.transforms import EvalTransform
from mobilenet_jax.training.validate import check_data
from mobilenet_jax.weights.card import read_preprocessing


class Images(NamedTuple):
    """Batches {"images" uint8 [B, S, S, 3], "mask" [B]} of one shape, and how the network expects them normalised."""

    batches: Iterable[Batch]
    count: int
    source: str  # the name of the images in the report
    size: int  # pixels of a side
    mean: tuple[float, ...]  # grey levels
    std: tuple[float, ...]  # grey levels


def open_files(paths: Sequence[str], card: dict, *, batch_size: int) -> Images:
    """Open image files, and folders of them at any depth, prepared as the card of the weights says.

    Iterating over the batches raises UnreadableImageError at the first file that cannot be read.

    Raises:
      ValueError: a folder without images, or an impossible preprocessing.
      OSError: a folder that cannot be read.
    """
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    transform = EvalTransform(given.image_size, given.crop_share, given.interpolation, given.squash)
    files = list_images(paths)
    batches = _read_files(files, transform, batch_size=min(batch_size, len(files)))
    return Images(batches, len(files), ", ".join(paths), given.image_size, given.mean, given.std)


def _read_files(files: list[Path], transform: EvalTransform, *, batch_size: int) -> Iterator[Batch]:
    for _, errors, images in read_batches(files, transform, batch_size=batch_size):
        for error in filter(None, errors):
            raise UnreadableImageError(error)
        yield {"images": images, "mask": np.arange(batch_size) < len(errors)}


def open_evaluation_set(path: str, overrides: list[str], card: dict, *, batch_size: int) -> Images:
    """Open the evaluation set of the config file `path`, prepared as the card of the weights says.

    Overrides (--config.data.KEY=VALUE) take precedence over the card and over `batch_size`.

    Raises:
      UsageError: a config file or an override that cannot be read.
      ValueError, OSError: a data set that cannot be opened.
    """
    config: Any = load_config(path, overrides)
    apply_preprocessing(config, card, overrides)
    data = config.data
    if not any(override.startswith("--config.data.eval_batch_size=") for override in overrides):
        data.eval_batch_size = batch_size
    check_data(data)
    batches, count = make_eval_batches(data, process_index=0, process_count=1)
    return Images(batches, count, f"the evaluation set of {path}", data.image_size, data.mean, data.std)
