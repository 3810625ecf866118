"""An image file to upright RGB pixels, or one sentence that says why not."""

import contextlib
import io
import stat
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

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
    if isinstance(data, Path) and not stat.S_ISREG(data.stat().st_mode):
        raise ValueError("it is no file")  # opening a pipe would wait for its other end
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {MAX_BYTES:,} are read")


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
    return np.asarray(image.convert("RGB"))
