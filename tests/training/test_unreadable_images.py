"""Training and evaluation meet images that cannot be read."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import make_config, send_at

from mobilenet_jax.data import folders
from mobilenet_jax.data.decode import UnreadableImageError
from mobilenet_jax.training.run import prepare, train_and_evaluate
from mobilenet_jax.workdir.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 + 4 images in two classes, one of the 20 damaged."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "train" / "a" / "3.png").write_bytes(b"no image")
    return root


def make_folder_config(folder: Path, **values) -> Any:
    return make_config(
        data__source="folder", data__path=str(folder), data__batch_size=8, data__eval_batch_size=4, **values
    )


def test_an_unreadable_training_image_stops_the_run_by_name(folder, tmp_path):
    with pytest.raises(UnreadableImageError, match=r"train/a/3\.png cannot be decoded") as error:
        train_and_evaluate(make_folder_config(folder), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_skipped_images_are_counted_and_the_count_survives_a_stop(folder, tmp_path, monkeypatch):
    values: dict = {"data__on_error": "skip", "train__steps": 9, "train__log_every_steps": 1}
    config = make_folder_config(folder, **values, train__save_every_epochs=0.0, train__eval_every_epochs=0.0)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train_and_evaluate(config, whole)
    # 72 examples: three epochs of 20 images and 12 of the fourth.
    counts = [line["data/skipped"] for line in read_metrics(whole)]
    assert result["skipped"] == counts[-1]
    assert 3 <= counts[-1] <= 4
    assert counts == sorted(counts)
    # Stopped just before a step that skips: what was read ahead is not counted.
    at = next(i for i, count in enumerate(counts) if count > counts[0]) or 1
    with monkeypatch.context() as patch:
        send_at(patch, at, signal.SIGTERM)
        assert train_and_evaluate(config, stopped)["step"] == at
    assert train_and_evaluate(config, stopped) == result
    assert [line["data/skipped"] for line in read_metrics(stopped)] == counts


def test_evaluation_never_skips(folder, tmp_path):
    (folder / "train" / "a" / "3.png").unlink()
    (folder / "test" / "b" / "1.png").write_bytes(b"no image")
    config = make_folder_config(folder, data__on_error="skip", train__steps=1)
    with pytest.raises(UnreadableImageError, match=r"test/b/1\.png cannot be decoded"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(("holdout", "listed"), [(0.0, ["train", "test"]), (0.25, ["train"])])
def test_a_folder_is_listed_once(folder, tmp_path, monkeypatch, holdout, listed):
    """A listing of ImageNet takes minutes on network storage."""
    seen = []
    original = folders._list_classes
    monkeypatch.setattr(folders, "_list_classes", lambda root, inner: seen.append(root.name) or original(root, inner))
    with prepare(make_folder_config(folder, data__holdout=holdout, data__on_error="skip"), tmp_path / "run") as run:
        next(run.images.iterator)
        assert run.images.eval_count == (5 if holdout else 4)
    assert seen == listed
