"""data.cache = "resized": small copies of training images in memory."""

import io
import json
import logging as python_logging
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.speed.photographs import load_sources
from configs import base
from mobilenet_jax.data import cache, loader
from mobilenet_jax.data.cache import ResizedImages
from mobilenet_jax.data.decode import UnreadableImageError, decode_image, open_croppable
from mobilenet_jax.data.sources import Record, open_source
from mobilenet_jax.data.transforms import draw_crop, make_train_transform
from tests.data.test_loader import assert_equal

SIZE = 24


def data_config(**values) -> Any:
    config: Any = base.get_config()
    config.data.update({"crop": "inception", "cache": "resized", "image_size": SIZE, **values})
    return config.data


def take(count: int, *, state: dict | None = None, **values) -> list[loader.Batch]:
    """Take the next `count` batches of a new iterator, from `state` on."""
    iterator = loader.make_train_iterator(data_config(**values), seed=3, process_index=0, process_count=1)
    try:
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


@pytest.fixture
def folder(tmp_path) -> dict:
    """Twelve files of two classes: photographs as JPEG, turned JPEG and PNG, larger and smaller than a copy."""
    photographs = list(load_sources().values())
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(12):
        image = photographs[i % len(photographs)].resize((40, 31) if i % 4 == 3 else (203 + i, 151 - i))
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02}.{('jpg', 'png', 'jpg', 'jpg')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, exif=turned if i % 4 == 2 else Image.Exif(), quality=92)
    return {"source": "folder", "path": str(tmp_path), "flip": True, "color_jitter": 0.4, "batch_size": 5}


def make_reader(folder: dict, *, limit: int = 2**30, **values) -> ResizedImages:
    config = data_config(**folder, **values)
    return ResizedImages(open_source(config, "train"), make_train_transform(config), limit=limit)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_the_stream_does_not_depend_on_what_is_kept(folder, monkeypatch, decode):
    kept = take(8, **folder, decode=decode)  # three epochs
    for limit in (0, 12_000):  # nothing fits; some images fit
        monkeypatch.setattr(loader, "MEMORY_BYTES", limit)
        assert_equal(take(8, **folder, decode=decode), kept)


def test_each_image_has_the_same_bytes_each_time(folder):
    kept, forgetful = make_reader(folder), make_reader(folder, limit=0)
    for index in range(12):
        first = kept.read(index)
        assert kept.read(index) is first
        assert forgetful.read(index) == forgetful.read(index) == first


def test_workers_give_the_batches_of_threads(folder):
    assert_equal(take(6, **folder, workers=2), take(6, **folder))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(folder, steps):
    iterator = loader.make_train_iterator(data_config(**folder), seed=3, process_index=0, process_count=1)
    for _ in range(steps):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    iterator.close()
    assert_equal(take(4, state=state, **folder), expected)


def test_labels_and_order_are_those_without_the_cache(tmp_path):
    """Every pixel of image i is i, so that a batch shows which images it holds."""
    for i in range(30):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (130, 140), 8 * i).save(path)
    options = {"source": "folder", "path": str(tmp_path), "batch_size": 7}
    assert_equal(take(9, **options), take(9, **options, cache=""))


def test_crops_are_close_to_those_of_the_same_part_of_the_original(folder):
    ranges: dict = {"area_range": (0.25, 1.0), "aspect_range": (3 / 4, 4 / 3)}
    reader, differences, within = make_reader(folder), [], []
    for index in range(12):
        image, _, name = reader.source[index]
        assert isinstance(image, Path)
        whole, (jpeg, _) = decode_image(image, name=name), reader.read(index)
        y, x = (full / small for full, small in zip(whole.shape[:2], jpeg.shape[:2], strict=True))
        for place in range(10):
            # The draws are shares of the image, so a crop of the copy differs from one of the original by rounding,
            # unless a rectangle fits into one of them and not into the other.
            left, top, width, height = draw_crop(jpeg.shape[:2], np.random.default_rng(place), **ranges)
            exact = draw_crop(whole.shape[:2], np.random.default_rng(place), **ranges)
            moved = np.abs(np.subtract((left * x, top * y, width * x, height * y), exact)).max()
            within.append(moved <= 1.5 * max(x, y) + 1)
            small = jpeg.resize_crop((left, top, width, height), size=SIZE, bicubic=False, mirrored=False)
            box = (left * x, top * y, min((left + width) * x, whole.shape[1]), min((top + height) * y, whole.shape[0]))
            same = Image.fromarray(whole).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
            differences.append(np.abs(np.asarray(same).astype(int) - small).mean())
    assert np.mean(within) > 0.9
    assert 0.5 < np.mean(differences) < 2.5
    assert max(differences) < 6


def test_a_copy_is_a_small_upright_jpeg_of_high_quality(folder):
    reader, limit = make_reader(folder), 2 * SIZE
    reference = io.BytesIO()
    Image.new("RGB", (8, 8)).save(reference, "JPEG", quality=95)
    for index in range(12):
        path = reader.source[index].image
        assert isinstance(path, Path)
        original, (copy, label) = decode_image(path, name="a"), reader.read(index)
        assert label == reader.source[index].label
        shape = original.shape
        if path.suffix == ".jpg" and min(shape[:2]) <= limit:
            assert copy.data == path.read_bytes()  # small and upright: nothing to gain
            continue
        assert min(copy.shape[:2]) == limit
        assert copy.shape[1] / copy.shape[0] == pytest.approx(shape[1] / shape[0], rel=0.02)
        with Image.open(io.BytesIO(copy.data)) as image, Image.open(reference) as other:
            assert image.quantization == other.quantization  # pyright: ignore[reportAttributeAccessIssue]
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # pyright: ignore[reportAttributeAccessIssue]
            assert "exif" not in image.info
        filtered = Image.fromarray(original).resize((copy.shape[1], copy.shape[0]), Image.Resampling.BILINEAR)
        difference = np.abs(decode_image(copy.data, name="a").astype(int) - np.asarray(filtered))
        assert difference.mean() < 2.5


class Arrays:
    """A source of encoded images, in order."""

    name, class_names = "arrays", ("a",)

    def __init__(self, *images: bytes):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], index, f"arrays {index}")


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_images_become_jpegs():
    narrow = encode(Image.new("L", (70_000, 3), 9), "PNG")  # a JPEG has at most 65,500 pixels on a side
    tiny = encode(Image.new("RGBA", (1, 1), (10, 20, 30, 255)), "PNG")
    small = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    cmyk = encode(small.convert("CMYK"), "JPEG")
    grey = encode(small.convert("L"), "JPEG")
    transform = make_train_transform(data_config())
    reader = ResizedImages(Arrays(narrow, tiny, cmyk, grey), transform, limit=2**20)
    shapes = [(3, 65_500, 3), (1, 1, 3), (30, 40, 3), (30, 40, 3)]
    assert [reader.read(i)[0].shape for i in range(4)] == shapes
    assert reader.read(3)[0].data == grey
    assert reader.read(2)[0].data != cmyk
    for index in range(4):
        jpeg, _ = reader.read(index)
        assert jpeg.plain
        assert transform.augment(jpeg, np.random.default_rng(0)).shape == (SIZE, SIZE, 3)


def test_memory_is_bounded_whatever_threads_do_and_said_once(caplog):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(256, size=(60, 70, 3), dtype=np.uint8)) for _ in range(40)]
    source, transform = Arrays(*(encode(image, "PNG") for image in images)), make_train_transform(data_config())
    size = len(ResizedImages(source, transform, limit=0).read(0)[0].data) + cache._OVERHEAD
    for limit, fits in ((100 * size, 40), (10 * size, 9), (0, 0)):
        reader = ResizedImages(source, transform, limit=limit)
        caplog.clear()
        with caplog.at_level(python_logging.INFO, logger="absl"), ThreadPoolExecutor(8) as pool:
            found = list(pool.map(reader.read, [*range(40), *range(40)]))
        assert [label for _, label in found] == [*range(40), *range(40)]
        assert found[:40] == found[40:]
        held = sum(len(jpeg.data) + cache._OVERHEAD for jpeg, _ in reader._kept.values())
        assert held == reader._bytes <= limit
        assert fits <= len(reader._kept) <= fits + 2
        (message,) = caplog.messages
        assert message.startswith(f"data.cache keeps {len(reader._kept)} of 40 images (")
        assert message.endswith("the others are made each time they are read") == (fits < 40)


@pytest.mark.parametrize(("workers", "copies"), [(0, 1), (1, 1), (2, 2)])
def test_workers_begin_with_nothing_and_share_the_limit(folder, workers, copies, monkeypatch):
    monkeypatch.setattr(loader, "MEMORY_BYTES", 1_000_000)
    config = data_config(**folder, workers=workers)
    maker = loader.make_train_iterator(config, seed=0, process_index=0, process_count=1)._maker
    maker.fill(0, range(5), maker.allocate(5))
    kept: Any = maker._read
    assert len(kept.__self__._kept) == 5
    copy = pickle.loads(pickle.dumps(maker))._read.__self__
    assert (copy._limit, copy._kept, copy._bytes) == (1_000_000 // copies, {}, 0)


def test_bytes_are_counted_with_what_python_takes_for_them():
    import tracemalloc

    small = encode(Image.new("RGB", (8, 8)), "JPEG")
    reader = ResizedImages(Arrays(*[small] * 2000), make_train_transform(data_config()), limit=2**30)
    reader.read(0)
    tracemalloc.start()
    for index in range(1, 2000):
        reader.source._images = [bytes(bytearray(small))] * 2000  # pyright: ignore[reportAttributeAccessIssue]
        reader.read(index)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken <= reader._bytes
    assert taken > 0.5 * reader._bytes


def test_originals_are_read_once_if_their_copies_fit(folder, monkeypatch):
    names = []
    original = cache.open_croppable
    monkeypatch.setattr(cache, "open_croppable", lambda data, **k: names.append(data) or original(data, **k))
    reader = make_reader(folder)
    for _ in range(3):
        for index in range(12):
            reader.read(index)
    assert len([name for name in names if isinstance(name, Path)]) == 12


def test_an_unreadable_image_stops_training_or_is_skipped(folder):
    Path(folder["path"], "train", "b", "01.png").write_bytes(b"no image")
    broken = Path(folder["path"], "train", "b", "03.jpg")  # small enough to be kept as it is
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(UnreadableImageError, match=r"0[13]\.(png|jpg) cannot be decoded"):
        take(3, **folder)
    batches = take(12, **folder, on_error="skip")  # five epochs
    assert sum(batch["skipped"].sum() for batch in batches) == 5 * 3  # 01.png is before 03.jpg


def test_arrays_are_read_as_without_the_cache():
    for source in ("digits", "fake:20"):
        options: dict = {"source": source, "num_classes": 3}
        assert_equal(take(2, **options), take(2, **options, cache=""))


def test_evaluation_is_the_same(folder):
    shutil.copytree(Path(folder["path"], "train"), Path(folder["path"], "test"))
    both = []
    for values in ({}, {"cache": ""}):
        batches, _ = loader.make_eval_batches(data_config(**folder, **values), process_index=0, process_count=1)
        both.append(list(batches))
    assert_equal(*both)


def test_copies_need_no_extension(folder, monkeypatch):
    reader = make_reader(folder)
    with_it = [reader.read(index)[0] for index in range(12)]
    from mobilenet_jax.data import decode

    expected = take(4, **folder)
    monkeypatch.setattr(decode, "_jpeg", None)
    reader = make_reader(folder)
    assert [reader.read(index)[0].data for index in range(12)] == [jpeg.data for jpeg in with_it]
    assert open_croppable(with_it[0].data, name="a") is None
    assert_equal(take(4, **folder), expected)
