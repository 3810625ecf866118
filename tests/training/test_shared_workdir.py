"""Several commands in one workdir: evaluation beside a run, and a second run."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from runs import STEPS, make_config

from mobilenet_jax.training.build import build
from mobilenet_jax.training.run import RefusedError, describe_workdir, evaluate_run, prepare, train_and_evaluate
from mobilenet_jax.workdir.checkpoint import Checkpoints
from mobilenet_jax.workdir.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


def list_files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_evaluation_beside_a_run_reads_the_newest_checkpoint_and_changes_nothing(tmp_path, monkeypatch):
    """Evaluated after each save of the run, while the next checkpoint is half written."""
    original, found = Checkpoints.save, {}

    def save(self, step, *arguments):
        original(self, step, *arguments)
        self.wait()
        unfinished = tmp_path / "checkpoints" / f"{step + 1}.orbax-checkpoint-tmp"
        (unfinished / "state").mkdir(parents=True)
        (unfinished / "state" / "manifest.ocdbt").write_bytes(b"half")
        before = list_files(tmp_path)
        evaluated = evaluate_run(make_config(), tmp_path)
        assert list_files(tmp_path) == before
        found[step] = evaluated.pop("step"), evaluated

    monkeypatch.setattr(Checkpoints, "save", save)
    train_and_evaluate(make_config(), tmp_path)
    assert {step: newest for step, (newest, _) in found.items()} == {4: 4, 8: 8, 12: 12}
    last = read_metrics(tmp_path)[-1]
    assert found[STEPS][1] == {key: value for key, value in last.items() if key.startswith(("eval/", "eval_ema/"))}


def test_a_second_run_is_refused_and_changes_nothing(tmp_path):
    with prepare(make_config(), tmp_path):
        (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
        before = list_files(tmp_path)
        said = f"{tmp_path} is in use: process {os.getpid()} on host {socket.gethostname()} trains there"
        with pytest.raises(RefusedError, match=re.escape(said)) as error:
            train_and_evaluate(make_config(), tmp_path)
        assert "\n" not in str(error.value)
        assert list_files(tmp_path) == before
    with prepare(make_config(), tmp_path):
        assert not (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").exists()
    assert not (tmp_path / "run.lock").exists()


def test_a_changed_config_is_kept_beside_the_new_one(tmp_path):
    first, second = (build(make_config(optim__lr_per_256=rate), tmp_path) for rate in (0.1, 0.2))
    describe_workdir(first, 0)
    describe_workdir(first, 4)
    assert sorted(path.name for path in tmp_path.glob("config*")) == ["config.json"]
    describe_workdir(second, 8)
    rates = {
        path.name: json.loads(path.read_text())["optim.lr_per_256"] for path in sorted(tmp_path.glob("config*.json"))
    }
    assert rates == {"config.8.json": 0.1, "config.json": 0.2}
