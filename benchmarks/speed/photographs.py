"""A folder of JPEGs, cut from photographs that installed packages contain."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.speed.cases import PHOTOGRAPH

QUALITY = 92


def write_photographs(folder: Path, count: int, size: tuple[int, int] = PHOTOGRAPH) -> dict:
    """Write `count` JPEGs of quality 92 to FOLDER/train/photographs, the same ones every time.

    Each is a random part of a photograph of scikit-image or scikit-learn, with 60% to 100% of its width. If neither
    package is installed, the photograph is noise with the 1/f spectrum of natural images (Field 1987). A part that is
    larger than 500x375 pixels is one of a mosaic of mirrored copies: enlarged photographs would have less detail in a
    pixel than those of a camera, and would be decoded faster.

    Args:
      folder: an empty folder.
      count: the number of files.
      size: width and height, pixels.

    Returns:
      {"sources": names, "count", "mean_bytes": mean size of a file}.
    """
    copies = max(1, min(side // own for side, own in zip(size, PHOTOGRAPH, strict=True)))
    sources = {name: _repeat(image, copies) for name, image in load_sources().items()}
    target = folder / "train" / "photographs"
    target.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        image = list(sources.values())[number % len(sources)]
        width = rng.uniform(0.6, 1) * min(image.width, image.height * size[0] / size[1])
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        part = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        part.save(target / f"{number:05d}.jpg", quality=QUALITY)
    mean = sum(file.stat().st_size for file in target.iterdir()) / count
    return {"sources": list(sources), "count": count, "mean_bytes": round(mean)}


def _repeat(image: Image.Image, copies: int) -> Image.Image:
    """Return a mosaic of an image with that many mirrored copies along each side."""
    height, width = image.height * (copies - 1), image.width * (copies - 1)
    return Image.fromarray(np.pad(np.asarray(image), ((0, height), (0, width), (0, 0)), mode="symmetric"))


def load_sources() -> dict[str, Image.Image]:
    """Load the colour photographs that installed packages contain, or one of noise if there are none."""
    arrays = {}
    if importlib.util.find_spec("skimage"):
        from skimage import data  # pyright: ignore[reportMissingImports]

        arrays |= {"astronaut": data.astronaut(), "chelsea": data.chelsea(), "coffee": data.coffee()}
    if importlib.util.find_spec("sklearn"):
        from sklearn.datasets import load_sample_images

        bunch: dict = dict(load_sample_images())  # pyright: ignore[reportCallIssue, reportArgumentType]
        arrays |= dict(zip((Path(name).stem for name in bunch["filenames"]), bunch["images"], strict=True))
    if not arrays:
        arrays = {"synthetic": draw_noise(np.random.default_rng(0), 480, 640)}
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def draw_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw uint8 [height, width, 3] with amplitudes of 1/frequency, and channels as correlated as a photograph's."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # removes the mean, which is set below
    white = rng.standard_normal((4, height, width))
    fields = np.fft.irfft2(np.fft.rfft2(white) / frequency[None], s=(height, width))
    mixed = 0.9 * fields[0][..., None] + 0.3 * np.moveaxis(fields[1:], 0, -1)
    return np.clip(127.5 + 50 * mixed / mixed.std(), 0, 255).astype(np.uint8)
