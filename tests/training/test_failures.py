"""One of two processes fails: both end soon, say why, and continue when they are started again."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import finish, start

from mobilenet_jax.training.failures import FailureWatch
from mobilenet_jax.workdir.metrics import read_metrics

IMAGES = 200
AGAIN = "the same command on every host continues from the last checkpoint"


def write_folders(root: Path) -> list[dict]:
    """Write a data set of two classes for each of two hosts; return the overrides that name them."""
    rng = np.random.default_rng(0)
    for name, count in (("train/a", IMAGES - 1), ("train/b", 1), ("test/a", 2), ("test/b", 2)):
        (root / "0" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(root / "0" / name / f"{i:03}.png")
    shutil.copytree(root / "0", root / "1")
    return [
        {"data.source": "folder", "data.path": root / host, "data.crop": "pad", "train.save_every_epochs": 0.01}
        for host in ("0", "1")
    ]


def kill_one(running: list[subprocess.Popen], victim: int, workdir: Path) -> tuple[str, float]:
    """Kill a process with SIGKILL after two more steps; return what the other said, and in how many seconds."""
    before = read_metrics(workdir)[-1]["step"]
    try:
        while read_metrics(workdir)[-1]["step"] < before + 2:
            assert all(process.poll() is None for process in running), finish(running)
            time.sleep(0.02)
        running[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        said = running[1 - victim].communicate(timeout=60)[1]
        assert running[1 - victim].returncode == 1
        return said, time.monotonic() - began
    finally:
        for process in running:
            process.kill()
        running[victim].communicate()


@pytest.mark.slow
def test_a_process_that_fails_or_is_killed_ends_the_other_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    workdir, own = tmp_path / "run", write_folders(tmp_path / "data")
    # The second process meets this image in the fourth step.
    index = np.random.default_rng((0, 0)).permutation(IMAGES)[3 * 32 + 20]
    file = tmp_path / "data" / "1" / "train" / "a" / f"{index:03}.png"
    file.write_bytes(b"no image")
    for said in finish(start(workdir, steps=1_000_000, processes=2, own=own), code=1):
        assert "process 1 on " in said
        assert f"failed: {file} cannot be decoded" in said
        assert AGAIN in said
        assert "Traceback" not in said
    assert 1 <= read_metrics(workdir)[-1]["step"] <= 3

    own = [{**values, "data.on_error": "skip"} for values in own]
    for victim in (0, 1):
        said, seconds = kill_one(start(workdir, steps=1_000_000, processes=2, own=own), victim, workdir)
        assert f"process {victim} was killed, or its machine is gone; {AGAIN}" in said
        assert "Traceback" not in said
        assert seconds < 30
        assert "continuing" in said
    # The image was skipped by the second process; the first one writes the metrics.
    assert read_metrics(workdir)[-1]["data/skipped"] > 0


def test_processes_of_different_configs_are_refused_on_both(tmp_path):
    own = [{"optim.lr_per_256": 1.0}, {"optim.lr_per_256": 5.0, "data.workers": 1}]
    workdir = tmp_path / "run"
    for said in finish(start(workdir, steps=3, processes=2, own=own), code=2):
        assert "the processes differ: config.optim.lr_per_256 is 1.0 on process 0 and 5.0 on process 1; start" in said
        assert "Traceback" not in said
    assert not (workdir / "checkpoints").exists()


def test_a_single_process_is_not_watched():
    with pytest.raises(KeyError), FailureWatch({KeyError: 2}):
        raise KeyError
