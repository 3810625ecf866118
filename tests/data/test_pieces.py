"""Batches are made in pieces, by several threads or workers, in bounded memory."""

import math
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest

from configs import base
from mobilenet_jax.data import loader, pieces
from mobilenet_jax.data.pieces import PIECE, Batch, BatchIterator, divide


class CountingMaker:
    """Row r of batch s is (s, r, the thread that wrote it); it knows how many rows are held and who wrote where."""

    def __init__(self, size: int):
        self.size, self.held, self.most, self.threads = size, 0, 0, set()
        self.written: list[Batch] = []
        self._lock = threading.Lock()

    def allocate(self, rows: int) -> Batch:
        with self._lock:
            self.held += rows
            self.most = max(self.most, self.held)
        return {"images": np.full((rows, 2), -1)}

    def fill(self, step: int, rows: range, out: Batch) -> None:
        assert len(rows) == len(out["images"]) <= PIECE
        assert (out["images"] == -1).all()  # each row is written once
        out["images"][:] = [(step, row) for row in rows]
        self.threads.add(threading.get_ident())
        self.written.append(out)
        time.sleep(0.001)


def test_pieces_cover_a_batch_and_are_as_equal_as_possible():
    for size in (1, 2, 63, 64, 65, 100, 127, 128, 129, 1000, 4096):
        rows = divide(size)
        assert [row for piece in rows for row in piece] == list(range(size))
        assert len(rows) == -(-size // PIECE)
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize(("size", "threads"), [(8, 3), (200, 1), (200, 3), (1000, 2)])
def test_threads_write_pieces_into_the_batch_and_hold_few_batches(size, threads):
    maker = CountingMaker(size)
    running = BatchIterator(maker, start=5, stop=12, workers=0, threads=threads)
    count = len(divide(size))
    limit = size + size * math.ceil(max(count, 2 * threads) / count)
    for step in range(5, 12):
        batch = next(running)
        assert batch["images"].tolist() == [[step, row] for row in range(size)]
        assert all(
            np.shares_memory(batch["images"], part["images"]) for part in maker.written if part["images"][0, 0] == step
        )
        time.sleep(0.02)  # lets the threads go as far ahead as they may
        maker.held -= size
        assert maker.most <= limit
    with pytest.raises(StopIteration):
        next(running)
    running.close()
    assert len(maker.threads) == min(threads, 3)


def take(count: int, **values) -> list[Batch]:
    config: Any = base.get_config()
    config.data.update({"crop": "pad", "flip": True, "erasing": 0.5, "image_size": 16, **values})
    iterator = loader.make_train_iterator(config.data, seed=3, process_index=0, process_count=1)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def test_the_stream_is_that_of_whole_batches(monkeypatch):
    value = 0
    for batch in take(3, batch_size=150):
        for name in sorted(batch):
            value = zlib.crc32(batch[name].tobytes(), value)
    assert value == 4084500439  # from the version that made each batch whole
    whole = take(3, batch_size=150)
    monkeypatch.setattr(pieces, "PIECE", 7)
    for a, b in zip(whole, take(3, batch_size=150), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_after_an_unreadable_image_the_same_batch_is_tried_again(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "0.png").write_bytes(b"no image")
    config: Any = base.get_config()
    config.data.update({"source": "folder", "path": str(tmp_path), "batch_size": 2})
    iterator = loader.make_train_iterator(config.data, seed=0, process_index=0, process_count=1)
    for _ in range(2):
        with pytest.raises(loader.UnreadableImageError, match=r"0\.png cannot be decoded"):
            next(iterator)
        assert iterator.get_state()["next_batch"] == 0
    iterator.close()
