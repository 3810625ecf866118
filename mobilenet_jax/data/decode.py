"""Decode an image file to upright RGB pixels, or say in one sentence why it cannot be decoded."""

import contextlib
import dataclasses
import io
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

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

# data.decode = "fast" decodes a JPEG at a half, a quarter or an eighth of its size, if the sides are still this many
# times those of the result: then the antialiased resize averages at least this many pixels in each direction.
OVERSAMPLING = 2

Extent = tuple[float, float, float, float]  # left, top, right, bottom


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
    return decode_scaled(data, name=name, least_side=None)[0]


def decode_scaled(data: bytes | Path, *, name: str, least_side: int | None) -> tuple[np.ndarray, Extent | None]:
    """Decode one image as `decode_image`, but a large JPEG at a part of its size.

    Args:
      data: the bytes of the file, or its path.
      name: the name of the image in errors.
      least_side: decode a JPEG at the smallest size, of 1, 1/2, 1/4 and 1/8, at which its shorter side has this many
        pixels; none: decode it in full. libjpeg computes the smaller image from fewer frequencies.

    Returns:
      (uint8[H, W, 3], extent). The extent is None if the image has its full size. Otherwise it is what the image covers
      of the array, in pixels. If a side is no multiple of the denominator, the outermost pixels at one edge are covered
      in part: 1003 pixels at a quarter are 251, of which 250.75 are covered.

    Raises:
      UnreadableImageError: as `decode_image` raises it.
    """
    try:
        _check_file(data)
        with _open(data) as file, Image.open(file, formats=FORMATS) as image:  # pyright: ignore[reportArgumentType]
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            held, extent = image.width * image.height, None
            if isinstance(image, JpegImageFile):
                _check_scans(file.count(_SCAN), held)
                if least_side is not None:
                    extent = _scale_down(image, least_side)
                    if "progressive" not in image.info:  # libjpeg holds all coefficients of a progressive image
                        held = image.width * image.height
            with _large_images if held > _LARGE else contextlib.nullcontext():
                return _to_rgb(image), extent
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError(
            f"{name} is refused as a decompression bomb ({error}); valid: at most {MAX_PIXELS} pixels"
        ) from error
    except UnidentifiedImageError as error:  # its text has the address of the file object
        raise UnreadableImageError(f"{name} cannot be decoded: it is no {', '.join(FORMATS)} image") from error
    except Exception as error:  # Pillow's readers raise many types on damaged bytes
        raise UnreadableImageError(f"{name} cannot be decoded: {error}") from error


def _scale_down(image: JpegImageFile, least_side: int) -> Extent | None:
    """Have a JPEG decoded at a part of its size; return its extent when it is upright, or None at the full size."""
    denominator = choose_denominator(min(image.size), least_side)
    if denominator == 1:
        return None
    exact = [side / denominator for side in image.size]
    image.draft(None, (least_side, least_side))  # chooses the same denominator
    right, bottom = (up - side for up, side in zip(image.size, exact, strict=True))  # not covered, as it is stored
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Not covered when the image is upright: left, top, right, bottom (EXIF 2.3, tag 0x0112).
    left, top, right, bottom = {
        2: (right, 0, 0, bottom),
        3: (right, bottom, 0, 0),
        4: (0, bottom, right, 0),
        5: (0, 0, bottom, right),
        6: (bottom, 0, 0, right),
        7: (bottom, right, 0, 0),
        8: (0, right, bottom, 0),
    }.get(orientation, (0, 0, right, bottom))
    width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
    return left, top, width - right, height - bottom


_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose width is the height of the upright image


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


@dataclasses.dataclass(frozen=True)
class CroppableJpeg:
    """A JPEG of which rectangles are decoded and resized, if the extension can do so without decoding all of it."""

    data: bytes
    name: str  # in errors
    shape: tuple[int, int, int]  # (H, W, 3) of the decoded image
    plain: bool  # it is stored upright, in grey or in colours of three channels
    in_part: bool  # the extension decodes the rectangle alone; otherwise Pillow decodes the whole image each time

    def resize_crop(
        self, box: tuple[int, int, int, int], *, size: int, bicubic: bool, mirrored: bool, fast: bool = False
    ) -> np.ndarray:
        """Return the rectangle (left, top, width, height) as uint8[size, size, 3].

        The result is equal, bit for bit, to an image from `decode_image` that Pillow 13 crops and resizes. (Older
        releases of Pillow always resize rows before columns. In some crops a few pixels then differ, by one grey level
        if bilinear.) The image below the rectangle is not read.

        With `fast`, the image is decoded at 1 / `choose_denominator` of its size, and the rectangle is that of
        `scale_box`. With a denominator of 1, the result is the same, bit for bit. Otherwise the pixels of photographs
        differ by 2 to 3 grey levels in the mean, by 7 in the mean of the worst crop, and single ones by up to 70,
        because the edges of the rectangle move by up to a quarter of a pixel of the result. With and without the
        extension, the result is the same. (The tests measure all of this.)

        Args:
          box: pixels of the image in its full size.
          size: pixels of the result's sides.
          bicubic: resize with the bicubic instead of the bilinear kernel.
          mirrored: exchange left and right.
          fast: decode fewer pixels.

        Raises:
          UnreadableImageError: as `decode_image` raises it.
        """
        denominator = choose_denominator(min(box[2:]), OVERSAMPLING * size) if fast else 1
        if self.in_part:
            assert _jpeg is not None
            out = np.empty((size, size, 3), np.uint8)
            scaled = scale_box(box, denominator)
            if _jpeg.read_crop(self.data, denominator, scaled, size, bicubic, mirrored, out):
                return out
        # The extension cannot crop it, or libjpeg has found a fault; Pillow decides whether the image is usable. It
        # chooses the same denominator: with q = side // d of at least 1, d is the largest power of 2 up to side // q.
        least_side = min(self.shape[:2]) // denominator if denominator > 1 else None
        whole, extent = decode_scaled(self.data, name=self.name, least_side=least_side)
        x, y = (round(denominator * edge) for edge in extent[:2]) if extent else (0, 0)  # not 0 if it was turned
        left, top, width, height = scale_box((box[0] + x, box[1] + y, box[2], box[3]), denominator)
        crop = Image.fromarray(whole[top : top + height, left : left + width])
        resized = crop.resize((size, size), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
        return np.asarray(ImageOps.mirror(resized) if mirrored else resized)


def choose_denominator(side: int, least: int) -> int:
    """Return the largest of 1, 2, 4, 8 by which `side` pixels can be divided so that at least `least` are left."""
    return next((denominator for denominator in (8, 4, 2) if side >= denominator * least), 1)


def scale_box(box: tuple[int, int, int, int], denominator: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) in an image that was decoded at 1 / denominator of its size.

    The edges are rounded to its pixels. A box within the image stays within it, because libjpeg rounds its sides up,
    and a side of at least n * denominator pixels has at least n afterwards.
    """
    left, top, width, height = box
    start, end = (
        [(place + denominator // 2) // denominator for place in corner]
        for corner in ((left, top), (left + width, top + height))
    )
    return start[0], start[1], end[0] - start[0], end[1] - start[1]


def can_crop() -> bool:
    """Return whether the extension _jpeg was built, so that JPEGs can be decoded in part."""
    return _jpeg is not None


def open_croppable(data: bytes | Path, *, name: str, or_whole: bool = False) -> CroppableJpeg | None:
    """Read the header of a JPEG of which rectangles can be decoded; None if only `decode_image` can decode the image.

    Only upright grey and colour JPEGs with a proper end and without interruptions can be decoded in part, and only if
    the extension was built. With `or_whole`, any other JPEG that `decode_image` does not refuse is opened too.
    """
    if isinstance(data, Path):
        if data.suffix.lower() not in (".jpg", ".jpeg") or (_jpeg is None and not or_whole):
            return None
        try:
            _check_file(data)
            data = data.read_bytes()
        except (OSError, ValueError):  # decode_image will raise it
            return None
    if shape := _measure_part(data):
        return CroppableJpeg(data, name, shape, plain=True, in_part=True)
    found = _measure_whole(data) if or_whole else None
    return CroppableJpeg(data, name, *found, in_part=False) if found else None


def _measure_part(data: bytes) -> tuple[int, int, int] | None:
    """Return the shape of a JPEG that the extension can decode in part, or None."""
    # A truncated file does not end so; a crop above the missing part would not notice.
    header = _jpeg.measure(data) if _jpeg is not None and data.rfind(b"\xff\xd9", -64) >= 0 else None
    if header is None:
        return None
    height, width, tagged = header
    if height * width > MAX_PIXELS or (tagged and not _is_upright(data)):
        return None
    try:
        _check_scans(data.count(_SCAN), height * width)
    except ValueError:  # decode_image will raise it
        return None
    return height, width, 3


def _is_upright(data: bytes) -> bool:
    found = _measure_whole(data)
    return found is not None and found[1]


def _measure_whole(data: bytes) -> tuple[tuple[int, int, int], bool] | None:
    """Return (the shape of a JPEG from `decode_image`, whether it is `plain`), or None if it is none or is refused."""
    try:
        with _open(data) as file, Image.open(file, formats=("JPEG",)) as image:  # pyright: ignore[reportArgumentType]
            if image.width * image.height > MAX_PIXELS:
                return None
            _check_scans(file.count(_SCAN), image.width * image.height)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
            return (height, width, 3), orientation == 1 and image.mode in ("L", "RGB")
    except Exception:  # as in decode_image, which will raise the error
        return None


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
