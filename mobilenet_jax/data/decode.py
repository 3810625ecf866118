"""An image file to upright RGB pixels, or one sentence that says why not."""

import contextlib
import io
import stat
import threading
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

try:
    from mobilenet_jax.data import _jpeg  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # built where there are a C compiler and libjpeg-turbo; the loader says that it was not
    _jpeg = None

# 8192 x 8192: ten times a 6-megapixel photograph, 200 MB of RGB. Below Pillow's own limit, so that ours
# speaks first.
MAX_PIXELS = 2**26
MAX_BYTES = 2**29  # of a file; twice what MAX_PIXELS take uncompressed, with transparency
_STRIP = 2**22  # pixels converted at a time: a large image is not held in memory several times over
_LARGE = 2**24  # pixels from which images are decoded one at a time, whatever the number of threads
_large_images = threading.Lock()

# What image data sets hold. Pillow's other readers are kept away from untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class UnreadableImageError(ValueError):
    """An image that cannot be read or is refused; the message names the file or the record."""


def decode_image(data: bytes | Path, *, name: str) -> np.ndarray:
    """Decodes one image, the first frame of an animation.

    EXIF orientation is applied; grey, palette and CMYK become RGB; 16-bit grey is scaled to 8 bits, not
    clipped; transparency is laid on white, the page that cut-outs, logos and clip art are drawn for.

    Args:
      data: the bytes of the file, or its path.
      name: what an error calls the image: its file, or its data set and record number.

    Returns:
      uint8[H, W, 3], possibly read-only.

    Raises:
      UnreadableImageError: missing, no file, damaged, cut short, of another format, of more than MAX_BYTES or of more
        than MAX_PIXELS pixels (refused from the header, before a pixel is decoded).
    """
    try:
        _check_file(data)
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            with _large_images if image.width * image.height > _LARGE else contextlib.nullcontext():
                return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{name} is refused as a decompression bomb ({error}): at most {MAX_PIXELS} pixels are decoded."
        ) from error
    except Exception as error:  # Pillow's readers raise a dozen types on damaged bytes; all mean the same here
        raise UnreadableImageError(f"{name} cannot be decoded: {error}") from error


def _check_file(data: bytes | Path) -> None:
    if isinstance(data, Path):
        status = data.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")  # opening a pipe would wait for its other end
    else:
        size = len(data)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {MAX_BYTES:,} are read")


class CroppableJpeg:
    """A JPEG of which any rectangle can be had, resized, for less than the whole costs."""

    def __init__(self, data: bytes, *, name: str, shape: tuple[int, int, int]):
        self._data, self._name = data, name
        self.shape = shape  # (H, W, 3) of the decoded image

    def resize_crop(self, box: tuple[int, int, int, int], *, size: int, bicubic: bool, mirrored: bool) -> np.ndarray:
        """The rectangle (left, top, width, height) as uint8[size, size, 3], left and right exchanged if `mirrored`.

        Equal to decode_image, cropped and resized by Pillow 13, bit for bit. (Older releases of Pillow resize rows
        before columns at any shape: of some crops a few pixels then differ, by a grey level if bilinear.) The image
        below the rectangle is not looked at.

        Raises:
          UnreadableImageError: as `decode_image`.
        """
        assert _jpeg is not None
        out = np.empty((size, size, 3), np.uint8)
        if _jpeg.read_crop(self._data, box, size, bicubic, mirrored, out):
            return out
        left, top, width, height = box  # libjpeg has found a fault: whether it can be lived with is Pillow's to say
        crop = Image.fromarray(decode_image(self._data, name=self._name)[top : top + height, left : left + width])
        resized = crop.resize((size, size), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
        return np.asarray(ImageOps.mirror(resized) if mirrored else resized)


def can_crop() -> bool:
    """Whether `open_croppable` ever returns something: whether the extension _jpeg was built."""
    return _jpeg is not None


def open_croppable(data: bytes | Path, *, name: str) -> CroppableJpeg | None:
    """An image that need not be decoded whole, from its header; None for one that `decode_image` must see.

    Those are all but upright grey and colour JPEGs that end as a JPEG does, and all where the extension is missing.
    """
    if _jpeg is None:
        return None
    if isinstance(data, Path):
        if data.suffix.lower() not in (".jpg", ".jpeg"):
            return None
        try:
            _check_file(data)
            data = data.read_bytes()
        except (OSError, ValueError):  # decode_image will say it
            return None
    # A file cut short ends otherwise; below the crop that would go unnoticed.
    header = _jpeg.measure(data) if data.rfind(b"\xff\xd9", -64) >= 0 else None
    if header is None:
        return None
    height, width, tagged = header
    if height * width > MAX_PIXELS or (tagged and not _is_upright(data)):
        return None
    return CroppableJpeg(data, name=name, shape=(height, width, 3))


def _is_upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # as in decode_image, which will say what it is
        return False


def _to_rgb(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    rows = max(1, _STRIP // image.width)
    if image.height <= rows:
        return _strip_to_rgb(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _strip_to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", or "I" in older Pillow, whose convert() would clip at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
