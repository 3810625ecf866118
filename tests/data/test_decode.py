import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from benchmarks.speed.photographs import load_sources
from mobilenet_jax.data import decode
from mobilenet_jax.data.decode import (
    UnreadableImageError,
    choose_denominator,
    decode_image,
    decode_scaled,
    open_croppable,
    scale_box,
)
from mobilenet_jax.data.transforms import EvalTransform, draw_crop

needs_extension = pytest.mark.skipif(
    not decode.can_crop(), reason="mobilenet_jax.data._jpeg was not built (it needs a C compiler and libjpeg-turbo)"
)

needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="older Pillow resizes along lines first, always",
)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height: int = 24, width: int = 40) -> np.ndarray:
    """A smooth picture with no symmetry, so that a turned or mirrored copy differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 4], axis=-1).astype(np.uint8)


def test_rgb_png_comes_out_unchanged_from_bytes_and_from_a_path(tmp_path):
    data = encode(Image.fromarray(gradient()))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        decoded = decode_image(source, name="a")
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, gradient())


@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 8), ("WEBP", 8), ("BMP", 0)])
def test_formats(kind, tolerance):
    decoded = decode_image(encode(Image.fromarray(gradient()), kind), name="a")
    assert np.abs(decoded.astype(int) - gradient()).mean() <= tolerance


def test_grey_and_one_bit_become_three_equal_channels():
    grey = gradient()[..., 0]
    decoded = decode_image(encode(Image.fromarray(grey)), name="a")
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(decode_image(encode(bits), name="a")[..., 1], (grey > 100) * 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 128, 257, 32768, 65279, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(levels)), name="a")
    np.testing.assert_array_equal(decoded[0, :, 0], np.round(levels[0] / 257))
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_sixteen_bit_rgb_is_scaled():
    # Pillow does not write 16-bit RGB, so the PNG is put together here: one row of three pixels.
    levels = np.array([[0, 0x8000, 0xFFFF], [0x1234, 0x00FF, 0x7F00], [0xFF00, 1, 2]], ">u2")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 3, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(b"\0" + levels.tobytes())) + chunk(b"IEND", b"")
    decoded = decode_image(data, name="a")
    assert np.abs(decoded[0] - levels / 257).max() < 1


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (0, 0, 0, 128)]
    decoded = decode_image(encode(Image.fromarray(rgba)), name="a")
    np.testing.assert_array_equal(decoded[0], [(200, 0, 0), (255, 255, 255), (127, 127, 127)])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(transparency):
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 0, 0, 0, 70, 80, 90])
    decoded = decode_image(encode(palette, transparency=transparency), name="a")
    np.testing.assert_array_equal(decoded[0], [(10, 20, 30), (255, 255, 255), (70, 80, 90)])


def test_grey_with_alpha():
    decoded = decode_image(encode(Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8))), name="a")
    np.testing.assert_array_equal(decoded[0], [(50, 50, 50), (255, 255, 255)])


def test_cmyk_jpeg_is_not_inverted():
    rgb = Image.new("RGB", (16, 16), (220, 40, 90))
    decoded = decode_image(encode(rgb.convert("CMYK"), "JPEG", quality=95), name="a")
    assert np.abs(decoded.reshape(-1, 3).mean(0) - (220, 40, 90)).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    # What a camera held each way stores for the same upright scene (EXIF 2.3, tag 0x0112).
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation](gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(Image.fromarray(stored.copy()), kind, exif=exif), name="a")
    assert decoded.shape == gradient().shape
    assert np.abs(decoded.astype(int) - gradient()).mean() < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_file_is_never_completed_with_grey(kind):
    whole = encode(Image.fromarray(gradient(64, 64)), kind)
    expected = decode_image(whole, name="a")
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            decoded = decode_image(whole[:length], name="cut.img")
        except UnreadableImageError:
            refused += 1
        else:  # only a trailer was cut off
            np.testing.assert_array_equal(decoded, expected)
            assert length > 0.9 * len(whole)
    assert refused > 50


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"record 7 cannot be decoded"):
        decode_image(b"not an image", name="record 7")
    with pytest.raises(UnreadableImageError, match=r"gone.jpg cannot be decoded"):
        decode_image(tmp_path / "gone.jpg", name=str(tmp_path / "gone.jpg"))
    broken = bytearray(encode(Image.fromarray(gradient())))
    broken[60:90] = bytes(30)
    with pytest.raises(UnreadableImageError):
        decode_image(bytes(broken), name="a")


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header for a picture that is not there."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(body)) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    idat = zlib.compress(bytes(1000))
    chunk += struct.pack(">I", len(idat)) + b"IDAT" + idat + struct.pack(">I", zlib.crc32(b"IDAT" + idat))
    return b"\x89PNG\r\n\x1a\n" + chunk


# Just above our limit; above the size at which Pillow warns; above the size at which Pillow raises.
@pytest.mark.parametrize(("width", "height"), [(8192, 8193), (10000, 10000), (65000, 65000)])
def test_a_bomb_is_refused_from_its_header(width, height, monkeypatch):
    monkeypatch.setattr(decode, "_to_rgb", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(UnreadableImageError, match=r"big\.png is refused as a decompression bomb.*67108864"):
        decode_image(bomb(width, height), name="big.png")


def test_a_bomb_is_refused_where_pillows_warnings_are_silenced(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImageError, match=r"decompression bomb"):
        decode_image(bomb(65000, 65000), name="big.png")


def test_what_is_no_file_or_too_long_is_refused_unopened(tmp_path):
    pipe, loop, long = tmp_path / "pipe.jpg", tmp_path / "loop.jpg", tmp_path / "long.webp"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    with long.open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(1 << 40)  # a hole: no bytes on the disk
    for path, said in (
        (pipe, "not a file"),
        (tmp_path, "not a file"),
        (loop, "symbolic links"),
        (long, "1,099,511,627,776"),
    ):
        with pytest.raises(UnreadableImageError, match=said):
            decode_image(path, name="a")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16"])
def test_strips_change_nothing(monkeypatch, mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(65536, size=(50, 40), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(256, size=(50, 40, 4), dtype=np.uint8)).convert(mode)
    data = encode(image, transparency=3) if mode == "P" else encode(image)
    whole = decode_image(data, name="a")
    monkeypatch.setattr(decode, "_STRIP", 40 * 7)
    np.testing.assert_array_equal(decode_image(data, name="a"), whole)


def test_a_large_photograph_below_the_limit_is_decoded():
    assert decode.MAX_PIXELS >= 50_000_000  # of the largest common cameras
    decoded = decode_image(encode(Image.new("L", (8192, 1024), 7), compress_level=1), name="a")
    assert decoded.shape == (1024, 8192, 3)
    assert decoded.min() == decoded.max() == 7


def test_reading_a_path_leaves_no_file_open(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(gradient()))[:-30])
    for _ in range(3):
        with pytest.raises(UnreadableImageError):
            decode_image(path, name="a")
    # An unclosed file would be a ResourceWarning, which is an error here.


# Crops of JPEGs, decoded alone


def photograph(height: int, width: int) -> Image.Image:
    """Colour edges at every scale, which chroma interpolated wrongly at a border would show."""
    small = np.random.default_rng(0).integers(256, size=(height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def as_440(data: bytes) -> bytes:
    """A 4:2:2 JPEG of 64x64 pixels with its blocks laid out as 4:4:0, which Pillow does not write."""
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x21
    return data[: frame + 11] + b"\x12" + data[frame + 12 :]


KINDS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "4:1:1": {"subsampling": "4:1:1"},
    "4:4:0": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "grey": {},
    "RGB": {"keep_rgb": True},
}


@needs_extension
@needs_pillow_13
@pytest.mark.parametrize("size", [(64, 64), (93, 131)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_is_that_of_the_whole_image_to_the_bit(kind, size):
    if kind == "4:4:0":
        size = (64, 64)
    image = photograph(*size).convert("L" if kind == "grey" else "RGB")
    data = encode(image, "JPEG", quality=92, **KINDS[kind])
    data = as_440(data) if kind == "4:4:0" else data
    whole, jpeg = decode_image(data, name="a"), open_croppable(data, name="a")
    assert jpeg is not None
    assert jpeg.shape == whole.shape == (*size, 3)
    rng = np.random.default_rng(0)
    for i in range(60):
        height, width = (int(rng.integers(1, side + 1)) for side in size)
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
        target, bicubic, mirrored = int(rng.integers(1, 80)), bool(i % 2), i % 3 == 0
        filtering = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        crop = Image.fromarray(whole[top : top + height, left : left + width])
        expected = np.asarray(crop.resize((target, target), filtering))[:, :: -1 if mirrored else 1]
        result = jpeg.resize_crop((left, top, width, height), size=target, bicubic=bicubic, mirrored=mirrored)
        np.testing.assert_array_equal(result, expected)


@needs_extension
def test_only_upright_whole_grey_and_colour_jpegs_are_cropped_encoded(tmp_path):
    image = photograph(40, 60)
    plain = encode(image, "JPEG")
    assert open_croppable(plain, name="a") is not None
    assert open_croppable(plain[:-30], name="a") is None
    assert open_croppable(encode(image), name="a") is None
    assert open_croppable(encode(image.convert("CMYK"), "JPEG"), name="a") is None
    assert open_croppable(b"", name="a") is None
    assert open_croppable(tmp_path / "gone.jpg", name="a") is None
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (open_croppable(encode(image, "JPEG", exif=exif), name="a") is None) == (orientation == 6)
    frame = plain.index(b"\xff\xc0")
    bomb = plain[: frame + 5] + struct.pack(">HH", 65000, 65000) + plain[frame + 9 :]
    assert open_croppable(bomb, name="a") is None
    with pytest.raises(UnreadableImageError, match=r"decompression bomb"):
        decode_image(bomb, name="a")


def outcome(function: Callable[..., np.ndarray], *args, **options) -> np.ndarray | str:
    try:
        return function(*args, **options)
    except UnreadableImageError as error:
        return str(error)


@needs_extension
@needs_pillow_13
def test_damaged_jpegs_fare_as_they_do_whole():
    rng, fates = np.random.default_rng(0), {"not opened": 0, "refused": 0, "read": 0}
    for i in range(120):
        damaged = bytearray(encode(photograph(64, 80), "JPEG", progressive=i % 2 == 0))
        for position in rng.integers(2, len(damaged) - 2, size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        jpeg = open_croppable(bytes(damaged), name="a.jpg")
        if jpeg is None:  # decode_image's to judge
            fates["not opened"] += 1
            continue
        height, width, _ = jpeg.shape
        whole = outcome(decode_image, bytes(damaged), name="a.jpg")
        crop = outcome(jpeg.resize_crop, (0, 0, width, height), size=32, bicubic=False, mirrored=False)
        fates["refused" if isinstance(crop, str) else "read"] += 1
        if isinstance(whole, str) or isinstance(crop, str):
            assert crop == whole
            assert "\n" not in crop
        else:
            np.testing.assert_array_equal(crop, Image.fromarray(whole).resize((32, 32), Image.Resampling.BILINEAR))
    assert min(fates.values()) >= 3, fates


@needs_extension
@needs_pillow_13
def test_a_crop_needs_nothing_from_below_it():
    data = encode(photograph(64, 64), "JPEG", quality=92)
    cut = open_croppable(data[: 3 * len(data) // 4] + b"\xff\xd9", name="cut.jpg")  # ends as a JPEG does, too early
    assert cut is not None
    top = cut.resize_crop((0, 0, 64, 16), size=16, bicubic=False, mirrored=False)
    expected = Image.fromarray(decode_image(data, name="a")[:16]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(top, expected)


@needs_extension
@needs_pillow_13
def test_jpegs_damaged_below_a_crop_are_refused_where_pillow_refuses_them():
    rng, fates = np.random.default_rng(1), {"refused": 0, "read": 0, "not opened": 0}
    whole = encode(photograph(64, 80), "JPEG", quality=95)
    start = whole.index(b"\xff\xda") + 14
    for _ in range(150):
        damaged = bytearray(whole)
        place = int(rng.integers((start + len(whole)) // 2, len(whole) - 4))
        damaged[place : place + 2] = bytes([255, int(rng.integers(256))])
        jpeg = open_croppable(bytes(damaged), name="a.jpg")
        judged = outcome(decode_image, bytes(damaged), name="a.jpg")
        if jpeg is None:
            fates["not opened"] += 1
            fates["refused"] += isinstance(judged, str)
            continue
        assert not isinstance(judged, str)
        crop = jpeg.resize_crop((0, 0, 80, 16), size=16, bicubic=False, mirrored=False)
        expected = Image.fromarray(judged[:16]).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(crop, expected)
        fates["read"] += 1
    assert min(fates.values()) >= 3, fates


def list_scans(data: bytes) -> list[int]:
    """Where the scans of a JPEG begin: their Huffman tables before them, if they have some."""
    places, place = [], 2
    while data[place + 1] != 0xD9:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            places.append(place)
            place += 2 + length
            while data[place] != 0xFF or data[place + 1] in (0, *range(0xD0, 0xD8)):
                place += 1
        else:
            place += 2 + length
    return places


@needs_extension
@needs_pillow_13
def test_a_progressive_jpeg_without_its_last_scans_is_as_pillow_reads_it():
    data = encode(
        photograph(80, 96).resize((160, 192), Image.Resampling.BILINEAR), "JPEG", quality=90, progressive=True
    )
    for scan in list_scans(data)[1:]:
        cut = data[:scan] + b"\xff\xd9"
        jpeg = open_croppable(cut, name="a")
        assert jpeg is not None
        box = (20, 30, 90, 100)
        crop = jpeg.resize_crop(box, size=50, bicubic=False, mirrored=False)
        part = Image.fromarray(decode_image(cut, name="a")[30:130, 20:110])
        np.testing.assert_array_equal(crop, np.asarray(part.resize((50, 50), Image.Resampling.BILINEAR)))


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(tmp_path):
    data = encode(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    assert decode_image(data, name="a").shape == (4096, 4096, 3)
    last = list_scans(data)[-1]
    repeated = data[:-2] + data[last:-2] * 200 + b"\xff\xd9"
    (tmp_path / "w.jpg").write_bytes(repeated)
    for source in (repeated, tmp_path / "w.jpg"):
        begun = time.process_time()
        with pytest.raises(
            UnreadableImageError, match=r"a cannot be decoded: it has 210 scans of 16,777,216 pixels; valid"
        ):
            decode_image(source, name="a")
        assert open_croppable(source, name="a") is None
        assert time.process_time() - begun < 5
    small = encode(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    more = small[:-2] + small[list_scans(small)[-1] : -2] * 200 + b"\xff\xd9"
    assert decode_image(more, name="a").shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_an_image_of_millions_of_parts_is_refused(kind):
    data = encode(Image.new("RGB", (8, 8)), kind)
    chunk = struct.pack(">I", 3) + b"tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    part, place = {"PNG": (chunk, 33), "JPEG": (b"\xff\xfe\0\x02", 2), "GIF": (b"\x21\xfe\0", 13 + 6)}[kind]
    begun = time.process_time()
    with pytest.raises(UnreadableImageError, match="a cannot be decoded: it has more than 200,000 parts"):
        decode_image(data[:place] + part * 1_000_000 + data[place:], name="a")
    assert time.process_time() - begun < 10
    assert decode_image(data[:place] + part * 10 + data[place:], name="a").shape == (8, 8, 3)


# JPEGs decoded at a part of their size


def test_the_denominator_is_the_largest_that_leaves_enough():
    for side in range(1, 300):
        for least in range(1, 80):
            denominator = choose_denominator(side, least)
            assert denominator == max([d for d in (2, 4, 8) if side / d >= least], default=1)


def test_a_scaled_box_stays_within_the_image_and_keeps_its_least_side():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in rng.integers(1, 400, size=2))
        w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
        box = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        assert scale_box(box, 1) == box
        for denominator in (2, 4, 8):
            left, top, right, bottom = (edge * denominator for edge in to_edges(scale_box(box, denominator)))
            exact = to_edges(box)
            assert np.abs(np.subtract((left, top, right, bottom), exact)).max() <= denominator / 2
            assert left >= 0
            assert top >= 0
            assert right // denominator <= -(-width // denominator)
            assert bottom // denominator <= -(-height // denominator)
            assert right - left >= w // denominator * denominator
            assert bottom - top >= h // denominator * denominator


def to_edges(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def photographs(copies: int) -> list[bytes]:
    """Photographs as JPEGs whose sides are no multiples of 8, each with that many mirrored copies along a side."""
    found = []
    for image in load_sources().values():
        pixels = np.asarray(image)
        more = [(0, side * (copies - 1)) for side in pixels.shape[:2]]
        pixels = np.pad(pixels, (*more, (0, 0)), mode="symmetric")
        height, width = (side // 8 * 8 - cut for side, cut in zip(pixels.shape, (3, 5), strict=False))
        found.append(encode(Image.fromarray(pixels[:height, :width]), "JPEG", quality=92))
    return found


def differ(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second)


def test_fast_crops_are_close_to_exact_ones_and_equal_where_nothing_is_scaled():
    rng, found = np.random.default_rng(0), {}
    for copies, size in ((1, 32), (1, 64), (3, 64)):
        for data in photographs(copies):
            jpeg = open_croppable(data, name="a", or_whole=True)
            assert jpeg is not None
            for i in range(20):
                box = draw_crop(jpeg.shape[:2], rng, area_range=(0.08, 1), aspect_range=(3 / 4, 4 / 3))
                options: dict = {"size": size, "bicubic": i % 2 == 0, "mirrored": i % 3 == 0}
                difference = differ(
                    jpeg.resize_crop(box, **options, fast=True), jpeg.resize_crop(box, **options, fast=False)
                )
                found.setdefault(choose_denominator(min(box[2:]), 2 * size), []).append(difference)
    assert found.keys() == {1, 2, 4, 8}
    assert not any(difference.any() for difference in found.pop(1))
    for differences in found.values():
        assert len(differences) >= 10
        assert 0.5 < np.mean([difference.mean() for difference in differences]) < 4
        assert max(difference.mean() for difference in differences) < 8
        assert max(difference.max() for difference in differences) < 80


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("squash", [False, True])
def test_fast_evaluation_is_close_to_the_exact_one(interpolation, squash):
    used = set()
    for copies, size, crop_share in ((1, 32, 0.875), (1, 64, 1.0), (2, 48, 0.875), (3, 64, 0.875)):
        transform = EvalTransform(size, crop_share, interpolation, squash, "fast")
        for data in photographs(copies):
            whole = decode_image(data, name="a")
            pixels, extent = decode_scaled(data, name="a", least_side=transform.least_side)
            denominator = choose_denominator(min(whole.shape[:2]), 2 * int(size / crop_share))
            used.add(denominator)
            assert pixels.shape == (*(-(-side // denominator) for side in whole.shape[:2]), 3)
            difference = differ(transform.prepare(pixels, extent), transform.prepare(whole))
            assert difference.mean() < (1 if denominator > 1 else 1e-9)
            assert difference.max() < 15
    assert used >= {2, 4, 8}


def test_fast_evaluation_of_long_images_is_close_to_the_exact_one():
    pixels = np.concatenate([np.asarray(image.resize((96, 300))) for image in load_sources().values()] * 5)
    transform = EvalTransform(16, 0.8, "bilinear", squash=False, decode="fast")
    for turned in (pixels, pixels.swapaxes(0, 1)):
        assert max(turned.shape) > 8 * min(turned.shape)
        data = encode(Image.fromarray(np.ascontiguousarray(turned[:-3, :-3])), "JPEG", quality=92)
        scaled, extent = decode_scaled(data, name="a", least_side=transform.least_side)
        assert extent is not None
        difference = differ(transform.prepare(scaled, extent), transform.prepare(decode_image(data, name="a")))
        assert difference.mean() < 1.5
        assert difference.max() < 20


def test_nothing_is_scaled_for_exact_and_for_nearest():
    assert EvalTransform(224, 0.875, "bilinear", squash=False).least_side is None
    assert EvalTransform(224, 0.875, "nearest", squash=True, decode="fast").least_side is None
    assert EvalTransform(224, 0.875, "bicubic", squash=False, decode="fast").least_side == 512


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(160, 240), (157, 235)])
def test_a_turned_jpeg_is_scaled_as_the_upright_one(orientation, size):
    """The crop of a turned photograph is that of the same photograph stored upright, but for the rounding of JPEG."""
    upright = np.asarray(next(iter(load_sources().values())).resize(size[::-1]))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(turned)), "JPEG", quality=98, subsampling=0, exif=exif)
    whole = decode_image(data, name="a")
    transform = EvalTransform(24, 1.0, "bilinear", squash=False, decode="fast")
    pixels, extent = decode_scaled(data, name="a", least_side=transform.least_side)
    assert pixels.shape == (-(-size[0] // 2), -(-size[1] // 2), 3)
    assert extent is not None
    assert (extent[2] - extent[0], extent[3] - extent[1]) == (size[1] / 2, size[0] / 2)
    difference = differ(transform.prepare(pixels, extent), transform.prepare(whole))
    assert difference.mean() < 1.2
    assert difference.max() < 20
    jpeg = open_croppable(data, name="a", or_whole=True)
    assert jpeg is not None
    assert (jpeg.shape, jpeg.plain) == (whole.shape, orientation == 1)
    assert jpeg.in_part == (orientation == 1 and decode.can_crop())
    options: dict = {"size": 24, "bicubic": False, "mirrored": False}
    crop = (20, 10, 130, 120)
    assert differ(jpeg.resize_crop(crop, **options, fast=True), jpeg.resize_crop(crop, **options)).mean() < 8


@needs_extension
@needs_pillow_13
@pytest.mark.parametrize("kind", KINDS)
def test_fast_crops_are_the_same_without_the_extension(kind, monkeypatch):
    size = (64, 64) if kind == "4:4:0" else (93, 131)
    image = photograph(*size).convert("L" if kind == "grey" else "RGB")
    data = encode(image, "JPEG", quality=92, **KINDS[kind])
    data = as_440(data) if kind == "4:4:0" else data
    jpeg = open_croppable(data, name="a")
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_jpeg", None)
        assert open_croppable(data, name="a") is None
        slow = open_croppable(data, name="a", or_whole=True)
    assert jpeg is not None
    assert slow is not None
    assert (slow.shape, slow.plain, slow.in_part) == (jpeg.shape, True, False)
    rng, used = np.random.default_rng(0), set()
    for i in range(80):
        height, width = (int(rng.integers(8, side + 1)) for side in size)
        box = int(rng.integers(size[1] - width + 1)), int(rng.integers(size[0] - height + 1)), width, height
        target = int(rng.integers(1, 12))
        used.add(choose_denominator(min(width, height), 2 * target))
        options: dict = {"size": target, "bicubic": i % 2 == 0, "mirrored": i % 3 == 0, "fast": True}
        np.testing.assert_array_equal(jpeg.resize_crop(box, **options), slow.resize_crop(box, **options))
    assert used == {1, 2, 4, 8}


def test_photographs_in_cmyk_and_with_images_behind_them_are_scaled_by_pillow():
    image = photograph(160, 240)
    jpeg = open_croppable(encode(image.convert("CMYK"), "JPEG", quality=95), name="a", or_whole=True)
    assert jpeg is not None
    assert (jpeg.shape, jpeg.plain, jpeg.in_part) == ((160, 240, 3), False, False)
    options: dict = {"size": 16, "bicubic": False, "mirrored": False}
    box = (16, 8, 128, 144)
    assert choose_denominator(128, 32) == 4
    assert differ(jpeg.resize_crop(box, **options, fast=True), jpeg.resize_crop(box, **options)).mean() < 3
    # Phones write MPO, a JPEG with further images behind it.
    mpo = encode(image, "MPO", save_all=True, append_images=[Image.new("RGB", (240, 160))], quality=95)
    assert decode_scaled(mpo, name="a", least_side=40)[0].shape == (40, 60, 3)
    assert decode_image(mpo, name="a").shape == (160, 240, 3)
    end = mpo.index(b"\xff\xd9")
    for least_side in (None, 40):
        with pytest.raises(UnreadableImageError, match=r"a cannot be decoded: it has 30002 scans of 38,400 pixels"):
            decode_scaled(mpo[:end] + b"\xff\xda" * 30_000 + mpo[end:], name="a", least_side=least_side)
    png = encode(image)
    assert open_croppable(png, name="a", or_whole=True) is None
    pixels, extent = decode_scaled(png, name="a", least_side=40)
    assert extent is None
    np.testing.assert_array_equal(pixels, np.asarray(image))


def test_damaged_and_huge_jpegs_are_refused_when_scaled_as_when_not():
    plain = encode(photograph(160, 240), "JPEG")
    frame = plain.index(b"\xff\xc0")
    bomb = plain[: frame + 5] + struct.pack(">HH", 65000, 65000) + plain[frame + 9 :]
    scans = plain[:-2] + b"\xff\xda" * 30_000 + b"\xff\xd9"
    for data, said in ((bomb, "decompression bomb"), (scans, "scans of 38,400 pixels"), (plain[:-400], "a cannot be")):
        with pytest.raises(UnreadableImageError, match=said):
            decode_scaled(data, name="a", least_side=20)
        with pytest.raises(UnreadableImageError, match=said):
            decode_image(data, name="a")
    assert open_croppable(bomb, name="a", or_whole=True) is None
    assert open_croppable(scans, name="a", or_whole=True) is None
    truncated = open_croppable(plain[:-400], name="a", or_whole=True)
    assert truncated is not None
    with pytest.raises(UnreadableImageError, match="a cannot be decoded"):
        truncated.resize_crop((0, 0, 240, 160), size=16, bicubic=False, mirrored=False, fast=True)


@needs_extension
@needs_pillow_13
def test_damaged_jpegs_fare_alike_with_and_without_the_extension_when_scaled():
    rng, fates = np.random.default_rng(2), {"refused": 0, "read": 0}
    for i in range(120):
        damaged = bytearray(encode(photograph(64, 80), "JPEG", progressive=i % 2 == 0))
        for position in rng.integers(2, len(damaged) - 2, size=rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        jpeg = open_croppable(bytes(damaged), name="a.jpg")
        if jpeg is None:
            continue
        height, width, _ = jpeg.shape
        whole = outcome(lambda data: decode_scaled(data, name="a.jpg", least_side=32)[0], bytes(damaged))
        if choose_denominator(min(height, width), 32) == 1:
            continue
        crop = outcome(jpeg.resize_crop, (0, 0, width, height), size=16, bicubic=False, mirrored=False, fast=True)
        fates["refused" if isinstance(crop, str) else "read"] += 1
        if isinstance(whole, str) or isinstance(crop, str):
            assert crop == whole
        else:
            _, _, w, h = scale_box((0, 0, width, height), choose_denominator(min(height, width), 32))
            np.testing.assert_array_equal(
                crop, Image.fromarray(whole[:h, :w]).resize((16, 16), Image.Resampling.BILINEAR)
            )
    assert min(fates.values()) >= 3, fates


@needs_extension
def test_the_extension_refuses_other_denominators():
    data = encode(photograph(16, 16), "JPEG")
    out = np.empty((4, 4, 3), np.uint8)
    for denominator in (-1, 0, 3, 16):
        with pytest.raises(ValueError, match=f"the denominator is {denominator}; valid: 1, 2, 4, 8"):
            decode._jpeg.read_crop(data, denominator, (0, 0, 1, 1), 4, False, False, out)  # pyright: ignore[reportOptionalMemberAccess]
    assert decode._jpeg.read_crop(data, 8, (0, 0, 2, 2), 4, False, False, out)  # pyright: ignore[reportOptionalMemberAccess]
    assert not decode._jpeg.read_crop(data, 8, (0, 0, 3, 2), 4, False, False, out)  # pyright: ignore[reportOptionalMemberAccess]
