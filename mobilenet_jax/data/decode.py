"""Decode an image file to upright RGB pixels, or say in one sentence why it cannot be decoded."""

import contextlib
import io
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

try:
    from mobilenet_jax.data import _jpeg  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # built only with a C compiler and libjpeg-turbo; the loader warns if it is missing
    _jpeg = None

# 8192 x 8192: ten times a 6-megapixel photograph, 200 MB of RGB. It is below Pillow's own limit, so that this limit
# is reached first.
MAX_PIXELS = 2**26
MAX_BYTES = 2**29  # of a file; twice the size of MAX_PIXELS uncompressed with transparency
# Files are read in parts. A photograph takes up to 10,000 reads; Pillow takes 10 microseconds for each, and a crafted
# file has millions of chunks.
MAX_READS = 200_000
MAX_SCANNED = 2**30  # pixels of a JPEG times its scans: 16 scans of the largest image; a progressive JPEG has 10
_STRIP = 2**22  # pixels converted at a time, so that memory holds no second copy of a large image
_LARGE = 2**24  # larger images (in pixels) are decoded one at a time, whatever the number of threads
_large_images = threading.Lock()

# The formats of image data sets. Pillow's other readers never see untrusted bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class UnreadableImageError(ValueError):
    """An image that cannot be read or is refused; the message names the file or the record."""


def decode_image(data: bytes | Path, *, name: str) -> np.ndarray:
    """Decode one image, or the first frame of an animation.

    EXIF orientation is applied. Grey, palette and CMYK become RGB. 16-bit grey is scaled to 8 bits, not clipped.
    Transparent images are laid on white, because cut-outs, logos and clip art are drawn for a white page.

    Args:
      data: the bytes of the file, or its path.
      name: the name of the image in errors: its file, or its data set and record number.

    Returns:
      uint8[H, W, 3], possibly read-only.

    Raises:
      UnreadableImageError: the file is missing, not a regular file, damaged, truncated, of another format, larger than
        MAX_BYTES, of more parts than MAX_READS, or has more than MAX_PIXELS pixels or MAX_SCANNED pixels in all scans
        (which are known before a pixel is decoded).
    """
    try:
        _check_file(data)
        with _open(data) as file, Image.open(file, formats=FORMATS) as image:  # pyright: ignore[reportArgumentType]
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            if image.format == "JPEG":
                _check_scans(file.count(_SCAN), image.width * image.height)
            with _large_images if image.width * image.height > _LARGE else contextlib.nullcontext():
                return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{name} is refused as a decompression bomb ({error}); valid: at most {MAX_PIXELS} pixels"
        ) from error
    except UnidentifiedImageError as error:  # its text has the address of the file object
        raise UnreadableImageError(f"{name} cannot be decoded: it is no {', '.join(FORMATS)} image") from error
    except Exception as error:  # Pillow's readers raise many types on damaged bytes
        raise UnreadableImageError(f"{name} cannot be decoded: {error}") from error


def _check_file(data: bytes | Path) -> None:
    if isinstance(data, Path):
        status = data.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")  # opening a pipe would wait for its other end
    else:
        size = len(data)
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; valid: at most {MAX_BYTES:,}")


_SCAN = b"\xff\xda"  # begins a scan; in the data of a scan, 0xff is followed by 0


class _File:
    """A file as Pillow reads it, that refuses to be read in more parts than an image has."""

    def __init__(self, file: BinaryIO):
        self._file, self._reads = file, 0

    def read(self, size: int = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ValueError(f"it has more than {MAX_READS:,} parts")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def count(self, pair: bytes) -> int:
        """Return how often two bytes occur, and leave the place as it was."""
        place, found, last = self._file.tell(), 0, b""
        self._file.seek(0)
        while block := self._file.read(2**20):
            found += (last + block).count(pair)
            last = block[-1:]
        self._file.seek(place)
        return found


@contextlib.contextmanager
def _open(data: bytes | Path) -> Iterator[_File]:
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        yield _File(file)


def _check_scans(scans: int, pixels: int) -> None:
    if scans * pixels > MAX_SCANNED:
        raise ValueError(f"it has {scans} scans of {pixels:,} pixels; valid: at most {MAX_SCANNED:,} in all")


class CroppableJpeg:
    """A JPEG of which a rectangle can be decoded and resized for less than the cost of decoding all of it."""

    def __init__(self, data: bytes, *, name: str, shape: tuple[int, int, int]):
        self._data, self._name = data, name
        self.shape = shape  # (H, W, 3) of the decoded image

    def resize_crop(self, box: tuple[int, int, int, int], *, size: int, bicubic: bool, mirrored: bool) -> np.ndarray:
        """Return the rectangle (left, top, width, height) as uint8[size, size, 3].

        The result is equal, bit for bit, to an image from `decode_image` that Pillow 13 crops and resizes. (Older
        releases of Pillow always resize rows before columns. In some crops a few pixels then differ, by one grey level
        if bilinear.) The image below the rectangle is not read.

        Args:
          box: pixels.
          size: pixels of the result's sides.
          bicubic: resize with the bicubic instead of the bilinear kernel.
          mirrored: exchange left and right.

        Raises:
          UnreadableImageError: as `decode_image` raises it.
        """
        assert _jpeg is not None
        out = np.empty((size, size, 3), np.uint8)
        if _jpeg.read_crop(self._data, box, size, bicubic, mirrored, out):
            return out
        left, top, width, height = box  # libjpeg has found a fault; Pillow decides whether the image is usable
        crop = Image.fromarray(decode_image(self._data, name=self._name)[top : top + height, left : left + width])
        resized = crop.resize((size, size), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
        return np.asarray(ImageOps.mirror(resized) if mirrored else resized)


def can_crop() -> bool:
    """Return whether the extension _jpeg was built, so that `open_croppable` can return an image."""
    return _jpeg is not None


def open_croppable(data: bytes | Path, *, name: str) -> CroppableJpeg | None:
    """Read the header of an image that can be decoded in part; None if only `decode_image` can decode it.

    Only upright grey and colour JPEGs with a proper end and without interruptions can be decoded in part, and only if
    the extension was built.
    """
    if _jpeg is None:
        return None
    if isinstance(data, Path):
        if data.suffix.lower() not in (".jpg", ".jpeg"):
            return None
        try:
            _check_file(data)
            data = data.read_bytes()
        except (OSError, ValueError):  # decode_image will raise it
            return None
    # A truncated file does not end so; a crop above the missing part would not notice.
    header = _jpeg.measure(data) if data.rfind(b"\xff\xd9", -64) >= 0 else None
    if header is None:
        return None
    height, width, tagged = header
    if height * width > MAX_PIXELS or (tagged and not _is_upright(data)):
        return None
    try:
        _check_scans(data.count(_SCAN), height * width)
    except ValueError:  # decode_image will raise it
        return None
    return CroppableJpeg(data, name=name, shape=(height, width, 3))


def _is_upright(data: bytes) -> bool:
    try:
        with _open(data) as file, Image.open(file, formats=("JPEG",)) as image:  # pyright: ignore[reportArgumentType]
            return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # as in decode_image, which will raise the error
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
    if image.mode.startswith("I"):  # 16-bit grey ("I" in older Pillow), which convert() would clip at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
