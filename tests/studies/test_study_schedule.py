"""The order of runs, and their division between processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.ablations import shortcut
from mobilenet_jax.studies import schedule
from mobilenet_jax.studies.records import write_record
from mobilenet_jax.studies.schedule import lock, run_all
from mobilenet_jax.studies.study import RunKey, Study

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study() -> Study:
    return Study(name="shortcut", config=shortcut.get_config("digits"), **shortcut.sweep())


@pytest.fixture
def taken(monkeypatch) -> list[RunKey]:
    """The runs that were taken, in order; each ends at once."""
    found = []

    def run_one(study, key, workdir, num_classes):
        found.append(key)
        write_record(key.folder(workdir), {"config": {}, "status": "failed", "seconds": 0.0})

    monkeypatch.setattr(schedule, "run_one", run_one)
    monkeypatch.setattr(schedule, "report", lambda study, workdir: None)
    return found


def test_seeds_are_interleaved_and_runs_of_another_process_are_skipped(study, tmp_path, taken):
    runs = study.list_runs(2, ["bottleneck", "none"])
    write_record(runs[2].folder(tmp_path), {"config": {}, "status": "finished", "seconds": 0.0})
    with lock(runs[0].folder(tmp_path) / "lock", wait=False):
        run_all(study, tmp_path, runs, 10)
        assert taken == [RunKey(0, "none"), RunKey(1, "none")]
    run_all(study, tmp_path, runs, 10)  # the other process died
    assert taken[2:] == [RunKey(0, "bottleneck")]


def test_a_run_that_another_process_releases_is_taken_in_the_next_pass(study, tmp_path, taken, monkeypatch):
    runs = study.list_runs(1, ["bottleneck", "none"])
    held = lock(runs[0].folder(tmp_path) / "lock", wait=False)
    held.__enter__()
    monkeypatch.setattr(schedule, "report", lambda study, workdir: held.__exit__(None, None, None))
    run_all(study, tmp_path, runs, 10)
    assert taken == [RunKey(0, "none"), RunKey(0, "bottleneck")]


def test_a_lock_belongs_to_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / "run" / "lock"
    code = f"""
import pathlib, time
from mobilenet_jax.studies.schedule import lock
with lock(pathlib.Path({str(path)!r}), wait=False) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with lock(path, wait=False) as mine:
            assert not mine
        other.kill()
    with lock(path, wait=False) as mine:
        assert mine
    with lock(path, wait=True) as mine:
        assert mine
