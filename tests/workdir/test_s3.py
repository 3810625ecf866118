"""Checkpoints in S3, in an emulator on this machine."""

import numpy as np
import pytest
from etils import epath

from benchmarks.emulators import emulate_s3, list_missing
from mobilenet_jax.workdir.checkpoint import Checkpoints, read_checkpoint
from mobilenet_jax.workdir.reading import list_steps

MISSING = list_missing("s3")
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"these packages are not installed: {', '.join(MISSING)}"),
    # The emulator and the client leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CONFIG = {"ema.decay": 0.0}


class Iterator:
    """An iterator that has a place and no data."""

    def __init__(self):
        self.place = 0

    def get_state(self) -> dict:
        return {"next_batch": self.place}

    def set_state(self, state: dict) -> None:
        self.place = state["next_batch"]


@pytest.fixture(scope="module")
def bucket():
    with emulate_s3() as url:
        yield url


def make_state(step: int) -> dict[str, np.ndarray]:
    return {"params": np.arange(5000, dtype=np.float32) + step}


def save(workdir: str, *steps: int) -> None:
    checkpoints, iterator = Checkpoints(workdir, keep=2), Iterator()
    for step in steps:
        iterator.place = step
        checkpoints.save(step, make_state(step), iterator, {"config": CONFIG})  # pyright: ignore[reportArgumentType]
    checkpoints.close()


def restore(workdir: str) -> tuple[dict, int]:
    checkpoints, iterator = Checkpoints(workdir, keep=2), Iterator()
    found = checkpoints.restore(make_state(0), iterator, config=CONFIG)  # pyright: ignore[reportArgumentType]
    checkpoints.close()
    assert found is not None
    return found[0], iterator.place


def test_checkpoints_are_kept_restored_and_read(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"{bucket}/run"
    save(workdir, 1, 2)
    save(workdir, 2, 3)
    assert list_steps(epath.Path(workdir) / "checkpoints") == [2, 3]
    state, place = restore(workdir)
    np.testing.assert_array_equal(state["params"], make_state(3)["params"])
    assert place == 3
    np.testing.assert_array_equal(read_checkpoint(workdir)[0]["params"], make_state(3)["params"])
    np.testing.assert_array_equal(read_checkpoint(f"{workdir}/checkpoints/2")[0]["params"], make_state(2)["params"])
    assert not list(tmp_path.iterdir())  # no folder s3:


def test_a_copy_that_was_interrupted_does_not_count_and_damage_is_set_aside(bucket):
    workdir = epath.Path(f"{bucket}/damaged")
    save(str(workdir), 1, 2)
    (workdir / "checkpoints" / "3" / "meta" / "metadata").write_text("half")
    file = workdir / "checkpoints" / "2" / "meta" / "metadata"
    file.write_text(file.read_text().replace("next_batch", "next_bitch"))
    state, place = restore(str(workdir))
    np.testing.assert_array_equal(state["params"], make_state(1)["params"])
    assert place == 1
    assert (workdir / "damaged_checkpoints" / "2" / "meta" / "metadata").exists()
    assert list_steps(workdir / "checkpoints") == [1]
