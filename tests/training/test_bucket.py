"""A workdir, a data folder and weights in a bucket of an emulator on this machine."""

import io
import json
import signal
from typing import Any

import fsspec
import numpy as np
import pytest
from etils import epath
from PIL import Image
from runs import make_config, send_at

from benchmarks.emulators import emulate_gcs, list_missing
from mobilenet_jax.data.sources import open_source
from mobilenet_jax.paths import as_path
from mobilenet_jax.training.run import RefusedError, evaluate_run, prepare, train_and_evaluate
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir import lock
from mobilenet_jax.workdir.metrics import read_metrics
from mobilenet_jax.workdir.reading import list_steps

MISSING = list_missing("gs")


def make_short_config() -> Any:
    """Six steps, with checkpoints of step 4 and 6."""
    return make_config(train__steps=6)


pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.skipif(bool(MISSING), reason=f"these packages are not installed: {', '.join(MISSING)}"),
    # The emulator and the clients leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def bucket():
    with emulate_gcs() as url:
        yield url


def test_a_run_in_a_bucket_is_stopped_continued_evaluated_and_loaded(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"{bucket}/runs/mine"
    with monkeypatch.context() as patch:
        send_at(patch, 3, signal.SIGTERM)
        assert train_and_evaluate(make_short_config(), workdir) == {"stopped": "SIGTERM", "step": 3}
    assert evaluate_run(make_short_config(), workdir)["step"] == 3
    result = train_and_evaluate(make_short_config(), workdir)
    local = train_and_evaluate(make_short_config(), tmp_path / "local")
    assert result == local
    assert [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(workdir)] == [
        {k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(tmp_path / "local")
    ]
    names = {path.name for path in epath.Path(workdir).iterdir() if not path.name.startswith("events")}
    assert names == {path.name for path in (tmp_path / "local").iterdir() if not path.name.startswith("events")}
    assert len([path for path in epath.Path(workdir).iterdir() if path.name.startswith("events")]) == 2
    assert json.loads((epath.Path(workdir) / "result.json").read_text()) == result
    assert train_and_evaluate(make_short_config(), workdir) == result
    _, variables, card = load_weights(workdir)
    _, expected, _ = load_weights(tmp_path / "local")
    np.testing.assert_array_equal(
        variables["params"]["stem"]["conv"]["kernel"], expected["params"]["stem"]["conv"]["kernel"]
    )
    assert card["metrics"]["eval/top1"] == read_metrics(workdir)[-1]["eval/top1"]
    assert {path.name for path in tmp_path.iterdir()} == {"local"}


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket):
    workdir = epath.Path(f"{bucket}/runs/mine")
    file = workdir / "checkpoints" / "6" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1').replace('"seed":0', '"seed":1'))
    with prepare(make_short_config(), workdir) as run:
        assert run.start.step == 4
    assert (workdir / "damaged_checkpoints" / "6" / "meta" / "metadata").exists()
    assert list_steps(workdir / "checkpoints") == [4]


def test_of_two_runs_one_creates_the_lease(bucket):
    system, name = fsspec.core.url_to_fs(f"{bucket}/lease")
    system.pipe_file(name, b"1", mode="create")
    with pytest.raises(FileExistsError):
        system.pipe_file(name, b"2", mode="create")
    assert system.cat_file(name) == b"1"


def test_a_second_run_in_a_bucket_is_refused(bucket, monkeypatch):
    monkeypatch.setattr(lock, "RENEW", 0.2)
    workdir = f"{bucket}/runs/locked"
    with (
        prepare(make_short_config(), workdir),
        pytest.raises(RefusedError, match=r"gs://bucket/runs/locked is in use: process \d+ on host"),
    ):
        train_and_evaluate(make_short_config(), workdir)
    assert not (epath.Path(workdir) / lock.LEASE_FILE).exists()
    with prepare(make_short_config(), workdir):
        pass


def test_weights_in_a_bucket(bucket, tiny_weights):
    save_weights(f"{bucket}/weights/tiny.safetensors", *tiny_weights)
    _, variables, card = load_weights(f"{bucket}/weights/tiny.safetensors")
    np.testing.assert_array_equal(
        variables["params"]["classifier"]["bias"], tiny_weights[1]["params"]["classifier"]["bias"]
    )
    assert card == tiny_weights[2] | {"spec": card["spec"]}
    with pytest.raises(FileNotFoundError, match=r"there are no weights gs://bucket/weights/none\.pth"):
        load_weights(f"{bucket}/weights/none.pth")


def test_images_in_a_bucket(bucket):
    folder = as_path(f"{bucket}/images")
    for split in ("train", "test"):
        for name, grey in (("cat", 10), ("dog", 200)):
            image = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), grey, np.uint8)).save(image, "PNG")
            (folder / split / name / "a.png").write_bytes(image.getvalue())
    config = make_config(data__source="folder", data__path=f"{bucket}/images")
    source = open_source(config.data, "train")
    assert (source.class_names, len(source)) == (("cat", "dog"), 2)
    record = source[1]
    assert isinstance(record.image, bytes)
    assert (record.label, record.name) == (1, "gs://bucket/images/train/dog/a.png")
    with prepare(
        make_config(data__source="folder", data__path=f"{bucket}/images", data__batch_size=2), f"{bucket}/r"
    ) as run:
        assert sorted(next(run.images.iterator)["images"].max(axis=(1, 2, 3))) == [10, 200]


def test_a_profile_in_a_bucket_is_refused_at_the_start(bucket):
    with pytest.raises(RefusedError, match="--profile writes to a local folder and --workdir is gs://bucket/runs/p"):
        train_and_evaluate(make_short_config(), f"{bucket}/runs/p", profile=(1, 2))
