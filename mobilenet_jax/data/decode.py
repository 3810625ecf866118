"""An image file to upright RGB pixels, or one sentence that says why not."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# 8192 x 8192: ten times a 6-megapixel photograph, 200 MB of RGB. Below Pillow's own limit, so that ours
# speaks first.
MAX_PIXELS = 2**26

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
      UnreadableImageError: missing, damaged, cut short, of another format, or of more than MAX_PIXELS pixels
        (refused from the header, before a pixel is decoded).
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{name} is refused as a decompression bomb ({error}): at most {MAX_PIXELS} pixels are decoded."
        ) from error
    except Exception as error:  # Pillow's readers raise a dozen types on damaged bytes; all mean the same here
        raise UnreadableImageError(f"{name} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: "I;16", or "I" in older Pillow, whose convert() would clip at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
