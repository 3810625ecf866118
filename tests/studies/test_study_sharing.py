"""A study takes over what another study beside it has computed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.ablations import shortcut
from mobilenet_jax.studies import schedule
from mobilenet_jax.studies.plan import make_plan
from mobilenet_jax.studies.records import read_record, write_record
from mobilenet_jax.studies.schedule import run_all
from mobilenet_jax.studies.sharing import FILES, find_finished
from mobilenet_jax.studies.study import RunKey, Study
from mobilenet_jax.training.config import flatten_config


@pytest.fixture
def study() -> Study:
    return Study(name="other", config=shortcut.get_config("digits"), **shortcut.sweep())


def finish(study: Study, key: RunKey, workdir: Path, **changes: Any) -> Path:
    """Write what a finished run leaves behind."""
    folder = key.folder(workdir)
    record = {"study": study.name, "variant": key.variant, "seed": key.seed, "num_classes": 10, "status": "finished"}
    config = flatten_config(study.make_config(key))
    write_record(folder, {**record, "seconds": 61.5, "config": config, **changes})
    for name in FILES:
        (folder / name).write_text(json.dumps({"file": name, "seed": key.seed}))
    return folder


def test_a_run_with_the_same_config_and_seed_is_taken_over_and_others_are_trained(study, tmp_path, monkeypatch, capsys):
    trained = []

    def train(study, key, workdir, num_classes):
        trained.append(key)
        finish(study, key, workdir)

    monkeypatch.setattr(schedule, "run_one", train)
    monkeypatch.setattr(schedule, "report", lambda study, workdir: None)
    # Another study has the same network under another name, trained from another folder of the data.
    base = study.variants[study.baseline]
    config = study.config.copy_and_resolve_references()
    config.data.data_dir = "/elsewhere"
    first = replace(study, name="first", config=config, variants={"as_in_the_paper": base}, baseline="as_in_the_paper")
    source = finish(first, RunKey(0, "as_in_the_paper"), tmp_path / "first")

    runs = study.list_runs(2, [study.baseline, "none"])
    plan = make_plan(study, tmp_path / "other", runs, needs_data=True).text
    assert "4 runs, 3 to do, 1 finished in other studies" in plan.splitlines()[0]
    run_all(study, tmp_path / "other", runs, 10)
    assert trained == [RunKey(0, "none"), RunKey(1, study.baseline), RunKey(1, "none")]
    taken = RunKey(0, study.baseline).folder(tmp_path / "other")
    assert f"results of {source}, which has the same config" in capsys.readouterr().err
    assert {name: (taken / name).read_bytes() for name in FILES} == {
        name: (source / name).read_bytes() for name in FILES
    }
    record = read_record(taken)
    assert record is not None
    assert record["config"] == flatten_config(study.make_config(RunKey(0, study.baseline)))
    assert (record["status"], record["seconds"], record["taken_from"]) == ("finished", 61.5, str(source))
    assert make_plan(study, tmp_path / "other", runs, needs_data=True).text.splitlines()[0].endswith("0 to do")


@pytest.mark.parametrize("spoil", ["seed", "config", "status", "taken", "file", "record", "own"])
def test_other_runs_are_not_taken_over(study, tmp_path, spoil):
    key = RunKey(0, study.baseline)
    assert find_finished(study, key, tmp_path / "other") is None
    folder = finish(study, key, tmp_path / "first")
    assert find_finished(study, key, tmp_path / "other") == folder
    if spoil == "seed":
        key = RunKey(1, study.baseline)
    elif spoil == "config":
        key = RunKey(0, "none")
    elif spoil == "status":
        finish(study, key, tmp_path / "first", status="failed")
    elif spoil == "taken":
        finish(study, key, tmp_path / "first", taken_from="/before")
    elif spoil == "file":
        (folder / "result.json").unlink()
    elif spoil == "record":
        (folder / "run.json").write_text("{")
    assert find_finished(study, key, tmp_path / ("first" if spoil == "own" else "other")) is None
