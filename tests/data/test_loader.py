import gc
import json
import logging as python_logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import base
from mobilenet_jax.data import decode, loader
from mobilenet_jax.data.decode import UnreadableImageError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
ROOT = Path(__file__).resolve().parents[2]
AUGMENTED = {"crop": "pad", "flip": True, "erasing": 0.5, "image_size": 16}


def data_config(**values) -> Any:
    config: Any = base.get_config()
    config.data.update(values)
    return config.data


def take(count: int, *, seed: int = 0, index: int = 0, of: int = 1, state=None, **values) -> list[loader.Batch]:
    """Take the next `count` batches of a new iterator, from `state` on."""
    iterator = loader.make_train_iterator(data_config(**values), seed=seed, process_index=index, process_count=of)
    try:
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_equal(first: list[loader.Batch], second: list[loader.Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def write_numbered(root: Path, count: int) -> None:
    """Write a data set in which every pixel of image i is i, so that a batch shows which images it holds."""
    for split in ("train", "test"):
        folder = root / split / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (4, 4), i).save(folder / f"{i:03}.png")


def numbers(batches: list[loader.Batch], mask: bool = False) -> list[int]:
    values = [batch["images"][batch["mask"]] if mask else batch["images"] for batch in batches]
    return np.concatenate(values)[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(tmp_path):
    write_numbered(tmp_path, 50)
    return {"source": "folder", "path": str(tmp_path), "image_size": 4}


# The stream


def test_batches_have_the_promised_types():
    batch = take(1, batch_size=8, image_size=20)[0]
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "images": ((8, 20, 20, 3), np.uint8),
        "labels": ((8,), np.int32),
        "skipped": ((8,), np.int32),
    }


def test_every_image_once_an_epoch_in_an_order_of_its_own(folder):
    # 50 images in batches of 8: batches straddle the epochs.
    stream = numbers(take(25, batch_size=8, **folder))
    epochs = [stream[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(50))


def test_the_order_is_unbiased(folder):
    epochs = 160
    stream = np.array(numbers(take(epochs, batch_size=50, **folder))).reshape(epochs, 50)
    # Each image is in the first half of half of the epochs, and its place does not depend on its number.
    first_half = np.array([(stream[:, :25] == i).sum() for i in range(50)])
    assert np.abs(first_half - epochs / 2).max() < 5 * (epochs * 0.25) ** 0.5
    correlations = [np.corrcoef(order, np.arange(50))[0, 1] for order in stream]
    assert abs(np.mean(correlations)) < 5 / (49 * epochs) ** 0.5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_images_is_enough(count):
    batches = take(3, batch_size=4, source=f"fake:{count}", image_size=4, num_classes=3)
    images = np.concatenate([batch["images"] for batch in batches]).reshape(12, -1)
    assert len(np.unique(images, axis=0)) == count
    assert all(len(np.unique(images[i : i + count], axis=0)) == count for i in range(0, 12, count))


def test_neighbouring_seeds_share_no_epoch(folder):
    orders = [tuple(numbers([batch])) for seed in range(4) for batch in take(4, seed=seed, batch_size=50, **folder)]
    assert len(set(orders)) == 16
    assert_equal(take(2, seed=1, batch_size=50, **folder), take(2, seed=1, batch_size=50, **folder))


def test_augmentation_differs_from_epoch_to_epoch_and_within_a_batch(folder):
    batches = take(2, batch_size=50, **{**folder, "erasing": 1.0, "image_size": 16})
    noise = [batch["images"][np.argsort(batch["images"][:, 0, 0, 0])] for batch in batches]
    assert not np.array_equal(noise[0], noise[1])
    masks = [(image != np.bincount(image.ravel()).argmax()).tobytes() for image in batches[0]["images"]]
    assert len(set(masks)) > 45


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_process_count(process_count):
    whole = take(30, batch_size=64, **AUGMENTED)  # past the end of an epoch
    parts = [take(30, batch_size=64, index=i, of=process_count, **AUGMENTED) for i in range(process_count)]
    joined = [{key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert_equal(whole, joined)


def test_labels_stay_with_their_images():
    source = loader.open_source(data_config(), "train")
    label_of = {np.asarray(source[i].image).tobytes(): source[i].label for i in range(len(source))}
    for batch in take(5, batch_size=64, image_size=8):
        for image, label in zip(batch["images"], batch["labels"], strict=True):
            assert label_of[image.tobytes()] == label


# State


@pytest.mark.parametrize("steps", [0, 1, 7, 22, 23, 50])
def test_trap_27_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(steps):
    iterator = loader.make_train_iterator(
        data_config(batch_size=64, **AUGMENTED), seed=3, process_index=0, process_count=1
    )
    for _ in range(steps):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    iterator.close()
    assert_equal(take(4, seed=3, state=state, batch_size=64, **AUGMENTED), expected)


def test_trap_28_the_state_is_after_the_last_batch_returned_and_not_after_prefetched_ones():
    iterator = loader.make_train_iterator(
        data_config(batch_size=64, **AUGMENTED), seed=3, process_index=0, process_count=1
    )
    whole = take(8, seed=3, batch_size=64, **AUGMENTED)
    for t in range(4):
        next(iterator)
        time.sleep(0.05)  # lets the thread prefetch
        assert_equal(take(2, seed=3, state=iterator.get_state(), batch_size=64, **AUGMENTED), whole[t + 1 : t + 3])
    iterator.close()


def test_an_iterator_can_be_set_back_while_its_threads_run():
    iterator = loader.make_train_iterator(data_config(batch_size=64), seed=3, process_index=0, process_count=1)
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    second = [next(iterator) for _ in range(3)]
    iterator.set_state(state)
    assert_equal([next(iterator) for _ in range(3)], second)
    iterator.set_state({**state, "next_batch": 0})
    assert_equal([next(iterator) for _ in range(3)], first)
    iterator.close()


def test_the_state_of_other_data_is_refused(folder):
    iterator = loader.make_train_iterator(data_config(**folder), seed=0, process_index=0, process_count=1)
    state = iterator.get_state()
    assert state == {"next_batch": 0, "images": 50, "batch_size": 64, "seed": 0}
    for key, value in (("images", 51), ("batch_size", 32), ("seed", 1)):
        with pytest.raises(ValueError, match=f"saved with {key} = {value} and now has {key} = {state[key]}"):
            iterator.set_state({**state, key: value})


def test_orbax_saves_and_restores_it(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    iterator = loader.make_train_iterator(data_config(batch_size=64), seed=3, process_index=0, process_count=1)
    assert isinstance(iterator, grain.DatasetIterator)
    for _ in range(5):
        next(iterator)
    handler = ocp.CheckpointManager(tmp_path, item_handlers={"data": grain.checkpoint.CheckpointHandler()})
    handler.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    handler.wait_until_finished()
    expected = [next(iterator) for _ in range(3)]
    iterator.close()
    restored = loader.make_train_iterator(data_config(batch_size=64), seed=3, process_index=0, process_count=1)
    handler.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    assert_equal([next(restored) for _ in range(3)], expected)
    restored.close()
    handler.close()


# Workers


@pytest.mark.slow
def test_trap_34_workers_give_the_batches_of_threads_and_close_without_a_trace():
    # A new process has not parsed absl's flags, and shows every warning and leak.
    code = """
import multiprocessing
import numpy as np
from configs import base
from mobilenet_jax.data import loader

def make(workers):
    config = base.get_config().data
    config.update(batch_size=150, crop="pad", erasing=0.5, workers=workers)  # three pieces for two workers
    return loader.make_train_iterator(config, seed=3, process_index=0, process_count=1)

def same(a, b):
    return all(np.array_equal(a[key], b[key]) and type(b[key]) is np.ndarray for key in a)

if __name__ == "__main__":
    plain, working = make(0), make(2)
    expected = [next(plain) for _ in range(9)]
    assert all(same(expected[t], next(working)) for t in range(3))
    state = working.get_state()
    assert all(same(expected[t], next(working)) for t in range(3, 6))
    other = make(0)  # saved with two workers, continued with none
    other.set_state(state)
    assert all(same(expected[t], next(other)) for t in range(3, 6))
    other.close()
    working.set_state(state)
    kept = [next(working) for _ in range(3)]
    assert all(same(expected[t + 3], kept[t]) for t in range(3))
    working.close()
    plain.close()
    assert not multiprocessing.active_children()
    config = base.get_config().data
    config.update(workers=1, eval_batch_size=100)
    batches, count = loader.make_eval_batches(config, process_index=0, process_count=1)
    assert sum(batch["mask"].sum() for batch in batches) == count == 360
    next(iter(batches))  # an iteration that is not finished
    assert not multiprocessing.active_children()
    print("done")
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
    assert "leaked" not in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


def test_an_unreadable_image_in_a_worker_raises_our_sentence(folder):
    for file in sorted((Path(folder["path"]) / "train" / "a").iterdir()):
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UnreadableImageError, match=r"^\S+\.png cannot be decoded: .*") as info:
        take(1, workers=1, batch_size=8, **folder)
    assert "\n" not in str(info.value)
    assert flags.FLAGS.is_parsed()


def test_a_closed_iterator_leaves_no_thread_and_returns_no_batch():
    iterator = loader.make_train_iterator(data_config(), seed=0, process_index=0, process_count=1)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match=r"closed"):
        next(iterator)
    deadline = time.monotonic() + 5
    while any("grain" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert not [thread.name for thread in threading.enumerate() if "grain" in thread.name]


# Unreadable images


def damage(folder: dict, split: str, *indices: int) -> None:
    for i in indices:
        (Path(folder["path"]) / split / "a" / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")


def test_training_stops_at_an_unreadable_image_and_names_it(folder):
    damage(folder, "train", 7)
    with pytest.raises(UnreadableImageError, match=r"007\.png cannot be decoded"):
        take(10, batch_size=8, **folder)


def test_training_skips_to_the_next_readable_image_and_counts(folder, caplog):
    damage(folder, "train", 7, 8, 49)
    iterator = loader.make_train_iterator(
        data_config(batch_size=10, on_error="skip", **folder), seed=0, process_index=0, process_count=1
    )
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        batches = [next(iterator) for _ in range(10)]  # two epochs
    state = iterator.get_state()
    following = [next(iterator) for _ in range(5)]
    iterator.close()
    for epoch in (batches[:5], batches[5:]):
        # 7 and 8 become 9, and 49 becomes 0; 7 skips two images.
        assert sorted(numbers(epoch)) == sorted([*(set(range(50)) - {7, 8, 49}), 9, 9, 0])
        skipped = np.concatenate([batch["skipped"] for batch in epoch])
        assert sorted(skipped[skipped > 0].tolist()) == [1, 1, 2]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3
    assert all(sum(f"{i:03}.png" in text for text in warned) == 1 for i in (7, 8, 49))
    resumed = take(5, state=state, batch_size=10, on_error="skip", **folder)
    assert_equal(resumed, following)


def test_nothing_readable_is_an_error_even_when_skipping(folder):
    damage(folder, "train", *range(50))
    with pytest.raises(UnreadableImageError, match=r"^none of the 50 images"):
        take(1, on_error="skip", **folder)


def test_evaluation_never_skips(folder):
    damage(folder, "test", 49)
    batches, _ = loader.make_eval_batches(data_config(on_error="skip", **folder), process_index=0, process_count=1)
    with pytest.raises(UnreadableImageError, match=r"049\.png"):
        list(batches)


# Crops of JPEGs that are not decoded whole


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of JPEGs too large to be kept in memory."""
    monkeypatch.setattr(loader, "MEMORY_BYTES", 0)
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        small = Image.fromarray(rng.integers(256, size=(7, 9, 3), dtype=np.uint8))
        small.resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg")
    return {
        "source": "folder",
        "path": str(tmp_path),
        "image_size": 24,
        "crop": "inception",
        "flip": True,
        "color_jitter": 0.4,
    }


def test_the_stream_is_the_same_with_and_without_the_extension(photographs, monkeypatch, caplog):
    if not decode.can_crop():
        pytest.skip("mobilenet_jax.data._jpeg was not built")
    cropped = take(5, batch_size=6, **photographs)
    assert caplog.messages == []
    monkeypatch.setattr(decode, "_jpeg", None)
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        assert_equal(cropped, take(5, batch_size=6, **photographs))
    assert [message for message in caplog.messages if message.startswith("JPEGs are decoded whole")] == caplog.messages
    assert len(caplog.messages) == 1
    monkeypatch.setattr(loader, "MEMORY_BYTES", 2**20)  # keeps all images, decoded
    assert_equal(cropped, take(5, batch_size=6, **photographs))


def test_a_jpeg_that_proves_damaged_at_its_crop_stops_training_or_is_skipped(photographs):
    file = Path(photographs["path"]) / "train" / "a" / "003.jpg"
    with Image.open(file) as image:
        image.save(file, progressive=True)
    data = bytearray(file.read_bytes())
    data[data.rindex(b"\xff\xda") + 4] = 9  # the number of components in the last scan, which has three
    file.write_bytes(data)
    whole = {**photographs, "area_range": (1.0, 1.0)}
    with pytest.raises(UnreadableImageError, match=r"003\.jpg cannot be decoded"):
        take(2, batch_size=10, **whole)
    batch = take(1, batch_size=10, on_error="skip", **whole)[0]
    assert sorted(batch["skipped"].tolist()) == [0] * 9 + [1]


@pytest.mark.parametrize("image_size", [24, 8])
def test_a_fast_stream_has_the_draws_of_the_exact_one_and_its_pixels_where_nothing_is_scaled(photographs, image_size):
    photographs |= {"image_size": image_size, "batch_size": 6, "erasing": 0.5}
    exact, fast = take(5, **photographs), take(5, decode="fast", **photographs)
    if 4 * image_size > 70:  # the shorter side of all photographs
        assert_equal(fast, exact)
        return
    differences = []
    for a, b in zip(exact, fast, strict=True):
        np.testing.assert_array_equal(a["labels"], b["labels"])
        differences += [np.abs(x.astype(int) - y).mean() for x, y in zip(a["images"], b["images"], strict=True)]
    assert 0.1 < np.mean(differences) < 6  # after other draws, colours and noise would differ by 50
    assert np.percentile(differences, 95) < 20


def test_a_fast_stream_is_the_same_without_the_extension_with_workers_and_with_more_memory(photographs, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in (1, 5):
        file = Path(photographs["path"]) / "train" / "a" / f"{number:03}.jpg"
        with Image.open(file) as image:
            image.save(file, exif=turned)
    photographs |= {"image_size": 8, "decode": "fast", "batch_size": 6}
    fast = take(4, **photographs)
    assert_equal(fast, take(4, workers=2, **photographs))
    for size in (2**20, 0):
        monkeypatch.setattr(loader, "MEMORY_BYTES", size)
        assert_equal(fast, take(4, **photographs))
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_jpeg", None)
            assert_equal(fast, take(4, **photographs))


@pytest.mark.parametrize("crop", ["pad", "resize"])
def test_fast_decoding_of_whole_images_is_close_in_training_and_evaluation(photographs, decoded, crop):
    shutil.copytree(Path(photographs["path"]) / "train", Path(photographs["path"]) / "test")
    options = {**photographs, "image_size": 12, "crop": crop, "crop_share": 0.875, "batch_size": 10}
    exact, fast = take(1, **options), take(1, **options, decode="fast")
    both = []
    for values in ({}, {"decode": "fast"}):
        batches, _ = loader.make_eval_batches(data_config(**options, **values), process_index=0, process_count=1)
        both.append(list(batches))
    for a, b in ((exact, fast), both):
        assert [batch.keys() for batch in a] == [batch.keys() for batch in b]
        for first, second in zip(a, b, strict=True):
            difference = np.abs(first["images"].astype(int) - second["images"])
            assert 0 < difference.mean() < 2
            assert difference.max() < 25
            np.testing.assert_array_equal(first["labels"], second["labels"])
    assert {least_side for _, least_side in decoded} == {None, 26}


# Evaluation


@pytest.mark.parametrize(
    ("batch_size", "process_count"), [(8, 1), (50, 1), (64, 1), (12, 2), (16, 4), (52, 4), (400, 4)]
)
def test_trap_22_every_image_is_evaluated_once(folder, batch_size, process_count):
    config = data_config(eval_batch_size=batch_size, **folder)
    seen, steps = [], set()
    for index in range(process_count):
        batches, count = loader.make_eval_batches(config, process_index=index, process_count=process_count)
        assert count == 50
        held = list(batches)
        assert len(held) == len(batches)
        steps.add(len(held))
        for batch in held:
            assert batch["images"].shape == (batch_size // process_count, 4, 4, 3)
            assert batch["mask"].dtype == bool
            assert batch["labels"].dtype == np.int32
            assert not batch["images"][~batch["mask"]].any()
            assert not batch["labels"][~batch["mask"]].any()
        seen += numbers(held, mask=True)
    assert sorted(seen) == list(range(50))
    assert steps == {-(-50 // batch_size)}


@pytest.mark.parametrize(("batch_size", "process_count", "device_count"), [(1, 1, 8), (50, 4, 32), (33, 1, 1)])
def test_evaluation_batches_are_rounded_up_to_the_devices(folder, batch_size, process_count, device_count):
    config = data_config(eval_batch_size=batch_size, **folder)
    seen = []
    for index in range(process_count):
        batches, count = loader.make_eval_batches(
            config, process_index=index, process_count=process_count, device_count=device_count
        )
        held = list(batches)
        size = len(held[0]["labels"]) * process_count
        assert size % device_count == 0
        assert batch_size <= size < batch_size + device_count
        seen += numbers(held, mask=True)
    assert count == len(seen)
    assert sorted(seen) == list(range(50))


def test_evaluation_can_be_repeated_and_given_up(folder):
    batches, _ = loader.make_eval_batches(data_config(eval_batch_size=8, **folder), process_index=0, process_count=1)
    first = list(batches)
    next(iter(batches))
    assert_equal(first, list(batches))


def test_evaluation_sees_the_holdout_where_there_is_one(folder):
    config = data_config(holdout=0.2, batch_size=10, eval_batch_size=4, **folder)
    batches, count = loader.make_eval_batches(config, process_index=0, process_count=1)
    held_out = numbers(list(batches), mask=True)
    assert count == len(held_out) == 10
    trained = numbers(take(4, batch_size=10, holdout=0.2, **folder))
    assert sorted(held_out + trained) == list(range(50))


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, int | None]]:
    """The names of the images that the loader decodes, and the pixels that their shorter sides need."""
    images = []

    def decode_scaled(data, *, name: str, least_side: int | None):
        images.append((name, least_side))
        return decode.decode_scaled(data, name=name, least_side=least_side)

    monkeypatch.setattr(loader, "decode_scaled", decode_scaled)
    return images


def test_what_is_kept_in_memory_stays_within_the_limit(folder, decoded, monkeypatch):
    for limit, twice in ((50 * 48, False), (50 * 48 - 1, True)):  # 48 bytes per image
        monkeypatch.setattr(loader, "MEMORY_BYTES", limit)
        decoded.clear()
        batches, _ = loader.make_eval_batches(data_config(**folder), process_index=0, process_count=1)
        assert_equal(list(batches), list(batches))
        assert len(decoded) == (100 if twice else 50)


@pytest.mark.parametrize(("workers", "copies"), [(0, 1), (1, 1), (2, 2)])
def test_each_worker_keeps_a_small_set_if_all_copies_fit(folder, decoded, monkeypatch, workers, copies):
    config = data_config(workers=workers, batch_size=50, **folder)
    for limit, twice in ((copies * 50 * 48, False), (copies * 50 * 48 - 1, True)):  # 48 bytes per image
        monkeypatch.setattr(loader, "MEMORY_BYTES", limit)
        decoded.clear()
        maker = loader.make_train_iterator(config, seed=0, process_index=0, process_count=1)._maker
        for epoch in (0, 1):  # as a worker does in its copy of the maker
            maker.fill(epoch, range(50), maker.allocate(50))
        assert len(decoded) == (100 if twice else 50)


# Config and speed


@pytest.mark.parametrize("source", ["digits", "tfds:fashion_mnist"])
def test_small_sets_are_read_fast_enough(source):
    if source != "digits" and not SHARED.is_dir():
        pytest.skip("needs the reference data beside the checkout")
    config = data_config(source=source, data_dir=str(SHARED / "data" / "tfds"), crop="pad", flip=True, holdout=0.0)
    if source != "digits":
        config.holdout = 0.95  # leaves 3,000 images, which are soon in memory
    iterator = loader.make_train_iterator(config, seed=0, process_index=0, process_count=1)
    for _ in range(48):
        next(iterator)
    start = time.process_time()  # unlike wall time, it does not depend on other work on the machine
    for _ in range(100):
        next(iterator)
    rate = 100 * config.batch_size / (time.process_time() - start)
    iterator.close()
    assert rate > 5000
