"""Resizing, cropping and augmentation of single images: uint8 in, uint8 out.

Every random transform takes its generator as an argument, so that an example's augmentation depends only on its place
in the run. The training step does normalisation, mixup and cutmix on the device.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mobilenet_jax.data.decode import OVERSAMPLING, CroppableJpeg, Extent

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_LONG = 8  # images of a larger aspect are resized in part; Pillow's float32 boxes may change a grey level there
CROPS = ("inception", "pad", "resize")


def resize_and_center_crop(
    image: np.ndarray,
    size: int,
    *,
    crop_share: float,
    interpolation: str,
    squash: bool = False,
    extent: Extent | None = None,
) -> np.ndarray:
    """Resize the shorter side to size / crop_share pixels, rounded down, and keep the central size x size.

    The pixels are equal to those of timm, and of torchvision's Resize and CenterCrop with their rounding of the longer
    side and of the crop's place. Of an extremely long image only the central part is resized, so that it costs no more
    than a square image.

    Args:
      image: uint8[H, W, 3].
      size: pixels of the result's sides.
      crop_share: side of the crop over the resized shorter side, in (0, 1].
      interpolation: a name in INTERPOLATIONS; nearest samples, the others filter.
      squash: resize both sides to size / crop_share and change the aspect, as Keras' load_img does.
      extent: what the image covers of the array, from `decode_scaled`; none: all. The result then has the geometry of
        the image in its full size.

    Returns:
      uint8[size, size, 3].
    """
    x0, y0, x1, y1 = extent or (0, 0, image.shape[1], image.shape[0])
    width, height = x1 - x0, y1 - y0
    shorter = _get_shorter_side(size, crop_share)
    if squash:
        resized = (shorter, shorter)
    else:
        resized = int(shorter * width / min(width, height)), int(shorter * height / min(width, height))
    left, top = (round((side - size) / 2) for side in resized)
    if resized == image.shape[1::-1]:
        return image[top : top + size, left : left + size]
    pixels, resample = Image.fromarray(image), INTERPOLATIONS[interpolation]
    if max(resized) <= _LONG * shorter:
        return np.asarray(pixels.resize(resized, resample, box=extent))[top : top + size, left : left + size]
    x, y = width / resized[0], height / resized[1]
    box = (x0 + left * x, y0 + top * y, min(x0 + (left + size) * x, x1), min(y0 + (top + size) * y, y1))
    return np.asarray(pixels.resize((size, size), resample, box=box))


def _get_shorter_side(size: int, crop_share: float) -> int:
    return int(size / crop_share + 1e-6)


def crop_inception(
    image: np.ndarray | CroppableJpeg,
    rng: np.random.Generator,
    *,
    size: int,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
    interpolation: str,
    flip: bool,
    fast: bool = False,
) -> np.ndarray:
    """Crop a random rectangle and resize it to size x size (Szegedy et al. 2015, section 6), then perhaps flip it.

    The area, as a share of the image's area, is uniform in area_range. Width over height is log-uniform in
    aspect_range. After 10 rectangles that do not fit, the largest central rectangle with an allowed aspect is used, as
    in torchvision.

    Args:
      image: uint8[H, W, 3], or an image still encoded.
      rng: the example's generator.
      size: pixels of the result's sides.
      area_range: smallest and largest share.
      aspect_range: smallest and largest aspect.
      interpolation: bicubic; any other name means bilinear.
      flip: exchange left and right in half of the draws.
      fast: decode fewer pixels of an image still encoded, as `CroppableJpeg.resize_crop` says. The draws are the same.

    Returns:
      uint8[size, size, 3].

    Raises:
      UnreadableImageError: an encoded image is damaged.
    """
    box = draw_crop(image.shape[:2], rng, area_range=area_range, aspect_range=aspect_range)
    mirrored = flip and rng.random() < 0.5
    if isinstance(image, CroppableJpeg):
        return image.resize_crop(box, size=size, bicubic=interpolation == "bicubic", mirrored=mirrored, fast=fast)
    left, top, width, height = box
    crop = Image.fromarray(image[top : top + height, left : left + width])
    resample = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    resized = crop.resize((size, size), resample)
    return np.asarray(ImageOps.mirror(resized) if mirrored else resized)


def draw_crop(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    area_range: tuple[float, float],
    aspect_range: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw the rectangle of `crop_inception` in an image of shape (H, W): left, top, width, height in pixels."""
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(*area_range)
        aspect = math.exp(rng.uniform(math.log(aspect_range[0]), math.log(aspect_range[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    aspect = min(max(width / height, aspect_range[0]), aspect_range[1])
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return (width - w) // 2, (height - h) // 2, w, h


def shift(image: np.ndarray, rng: np.random.Generator, *, pad: int) -> np.ndarray:
    """Move uint8[H, W, 3] by up to `pad` pixels each way over black: the pad and crop of He et al. 2015, 4.2."""
    height, width = image.shape[:2]
    dy, dx = rng.integers(-pad, pad + 1, size=2)
    moved = np.zeros_like(image)
    moved[max(dy, 0) : height + dy, max(dx, 0) : width + dx] = image[
        max(-dy, 0) : height - dy, max(-dx, 0) : width - dx
    ]
    return moved


def jitter_color(image: np.ndarray, rng: np.random.Generator, *, strength: float) -> np.ndarray:
    """Change brightness, contrast and saturation of uint8[H, W, 3] in random order.

    Each has its own factor, uniform in [max(0, 1 - strength), 1 + strength], as in torchvision's ColorJitter.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    pixels = Image.fromarray(image)
    for i in rng.permutation(len(enhancers)):
        pixels = enhancers[i](pixels).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return np.asarray(pixels)


def erase(image: np.ndarray, rng: np.random.Generator, *, probability: float) -> np.ndarray:
    """Overwrite a random rectangle of uint8[H, W, 3] with noise, with a probability (Zhong et al. 2017).

    As in torchvision's RandomErasing, the area is 0.02..0.33 of the image, the aspect is log-uniform in 0.3..3.3, and
    there are 10 tries. The noise is drawn for each pixel and channel, as in timm's mode "pixel".
    """
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            erased = image.copy()
            erased[top : top + h, left : left + w] = rng.integers(256, size=(h, w, 3), dtype=np.uint8)
            return erased
    return image


def _move(
    matrix: Callable[[float, int, int], tuple[float, ...]],
) -> Callable[[Image.Image, float], Image.Image]:
    """Make an operation that moves pixels by matrix(level, width, height), over AutoAugment's grey."""

    def apply(image: Image.Image, level: float) -> Image.Image:
        data = matrix(level, image.width, image.height)
        return image.transform(
            image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        )

    return apply


# RandAugment's operations as functions of (image, level in -1..1). The list and the ranges are torchvision's; they
# come from AutoAugment's table 6 (arXiv 1805.09501). Level 1 is magnitude 10.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, level: image,
    "shear_x": _move(lambda level, w, h: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": _move(lambda level, w, h: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": _move(lambda level, w, h: (1, 0, 150 / 331 * w * level, 0, 1, 0)),
    "translate_y": _move(lambda level, w, h: (1, 0, 0, 0, 1, 150 / 331 * h * level)),
    "rotate": lambda image, level: image.rotate(30 * level, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "solarize": lambda image, level: ImageOps.solarize(image, round(255 * (1 - abs(level)))),
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
}


def apply_randaugment(
    image: np.ndarray, rng: np.random.Generator, *, layers: int, magnitude: float, probability: float
) -> np.ndarray:
    """Apply `layers` random OPERATIONS in a row: RandAugment (Cubuk et al. 2019).

    Args:
      image: uint8[H, W, 3].
      rng: the example's generator.
      layers: the number of operations, drawn uniformly and with replacement.
      magnitude: 0..10, the same for all operations; the sign is random.
      probability: of applying each drawn operation (1 in the paper, 0.5 in timm).

    Returns:
      uint8[H, W, 3].
    """
    operations = tuple(OPERATIONS.values())
    pixels = Image.fromarray(image)
    for _ in range(layers):
        operation, sign = operations[rng.integers(len(operations))], rng.choice((-1, 1))
        if rng.random() < probability:
            pixels = operation(pixels, sign * magnitude / 10)
    return np.asarray(pixels)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The transform of evaluation: `resize_and_center_crop`. Fields are keys of config.data."""

    image_size: int
    crop_share: float
    interpolation: str
    squash: bool
    decode: str = "exact"

    @property
    def least_side(self) -> int | None:
        """The argument of `decode_scaled`: pixels of the shorter side; none: all.

        With decode="fast", the image is decoded to at least OVERSAMPLING times the side that it is resized to. This
        changes the pixels of photographs by 0.3 to 0.8 grey levels in the mean, and by 10 at most (the tests measure
        it). Nearest-neighbour resizing averages no pixels, so for it the image is always decoded in full.
        """
        if self.decode == "exact" or self.interpolation == "nearest":
            return None
        return OVERSAMPLING * _get_shorter_side(self.image_size, self.crop_share)

    @property
    def scaled_from(self) -> None:
        """None: images are prepared whole; see `TrainTransform.scaled_from`."""

    def prepare(self, image: np.ndarray, extent: Extent | None = None) -> np.ndarray:
        """Return uint8[S, S, 3] of uint8[H, W, 3] and the extent from `decode_scaled`."""
        return resize_and_center_crop(
            image,
            self.image_size,
            crop_share=self.crop_share,
            interpolation=self.interpolation,
            squash=self.squash,
            extent=extent,
        )

    __call__ = prepare


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """The transform of training: `prepare`, which is the same each time, then `augment`.

    Fields are keys of config.data. A data set that fits in memory is prepared once.
    """

    image_size: int
    crop_share: float
    interpolation: str
    squash: bool
    decode: str
    cache: str
    crop: str
    area_range: tuple[float, float]
    aspect_range: tuple[float, float]
    pad: int
    flip: bool
    color_jitter: float
    randaugment_layers: int
    randaugment_magnitude: float
    randaugment_probability: float
    erasing: float

    @property
    def least_side(self) -> int | None:
        """The argument of `decode_scaled` for an image that `prepare` gets: as in evaluation, all for a random crop."""
        return None if self.crop == "inception" else self._evaluation.least_side

    @property
    def scaled_from(self) -> int | None:
        """The shorter side, in pixels, from which on a crop of a JPEG may be decoded at less than its size; none: none.

        Such an image must stay encoded, because the size at which it is decoded depends on the crop.
        """
        return 2 * OVERSAMPLING * self.image_size if self.crop == "inception" and self.decode == "fast" else None

    @property
    def _evaluation(self) -> EvalTransform:
        return EvalTransform(self.image_size, self.crop_share, self.interpolation, self.squash, self.decode)

    def prepare(self, image: np.ndarray, extent: Extent | None = None) -> np.ndarray:
        """Return uint8[S, S, 3] of uint8[H, W, 3] as in evaluation; the image itself if the crop is random."""
        return image if self.crop == "inception" else self._evaluation(image, extent)

    def augment(self, image: np.ndarray | CroppableJpeg, rng: np.random.Generator) -> np.ndarray:
        """Return uint8[S, S, 3] of a prepared image, which stays unchanged.

        With crop="inception" the image may still be encoded; UnreadableImageError is raised if it is damaged.
        """
        if self.crop == "inception":
            image = crop_inception(
                image,
                rng,
                size=self.image_size,
                area_range=self.area_range,
                aspect_range=self.aspect_range,
                interpolation=self.interpolation,
                flip=self.flip,
                fast=self.decode == "fast",
            )
        else:
            assert isinstance(image, np.ndarray)
            if self.crop == "pad":
                image = shift(image, rng, pad=self.pad)
            if self.flip and rng.random() < 0.5:
                image = image[:, ::-1]
        if self.color_jitter:
            image = jitter_color(image, rng, strength=self.color_jitter)
        if self.randaugment_layers:
            image = apply_randaugment(
                image,
                rng,
                layers=self.randaugment_layers,
                magnitude=self.randaugment_magnitude,
                probability=self.randaugment_probability,
            )
        if self.erasing:
            image = erase(image, rng, probability=self.erasing)
        return image

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return uint8[S, S, 3] of uint8[H, W, 3]."""
        return self.augment(self.prepare(image), rng)


def make_eval_transform(data_config) -> EvalTransform:
    """Make the transform of evaluation, f(image uint8[H, W, 3]) -> uint8[S, S, 3]."""
    return EvalTransform(**_fields(EvalTransform, data_config))


def make_train_transform(data_config) -> TrainTransform:
    """Make the transform of training, f(image uint8[H, W, 3], rng) -> uint8[S, S, 3]."""
    return TrainTransform(**_fields(TrainTransform, data_config))


def _fields(kind: type, data_config) -> dict:
    return {field.name: data_config[field.name] for field in dataclasses.fields(kind)}
