"""The records of runs in a workdir."""

import re
from typing import Any

import pytest

from configs.ablations import shortcut
from mobilenet_jax.studies.records import check_record, find_runs, read_record, write_record
from mobilenet_jax.studies.study import RunKey, Study
from mobilenet_jax.training.config import flatten_config


@pytest.fixture
def study() -> Study:
    return Study(name="shortcut", config=shortcut.get_config("digits"), **shortcut.sweep())


def make_record(study: Study, key: RunKey, **changes: Any) -> dict[str, Any]:
    return {"config": flatten_config(study.make_config(key)), "status": "started", "seconds": 1.5, **changes}


def test_runs_are_listed_in_the_order_of_the_sweep(study, tmp_path):
    for key in (RunKey(10, "none"), RunKey(9, "none"), RunKey(0, "bottleneck"), RunKey(0, "expansion")):
        write_record(key.folder(tmp_path), make_record(study, key))
    (tmp_path / "none" / "seed_3").mkdir()  # without a record
    (tmp_path / "another").mkdir()
    assert find_runs(study, tmp_path) == [
        RunKey(0, "bottleneck"),
        RunKey(0, "expansion"),
        RunKey(9, "none"),
        RunKey(10, "none"),
    ]
    assert read_record(tmp_path / "none" / "seed_3") is None


@pytest.mark.parametrize("text", ["", "[]", '{"status": "done", "config": {}, "seconds": 0}', '{"status": "started"}'])
def test_a_damaged_record_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=f"is not a record of a run: .*; remove {tmp_path} to run it again") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


def test_another_config_is_refused_and_its_keys_are_named(study, tmp_path):
    key = RunKey(0, "none")
    check_record(study, key, tmp_path)  # not started
    record = make_record(study, key)
    free = {"data.data_dir": "/elsewhere", "data.workers": 3, "name": "x", "train.keep_checkpoints": 5}
    write_record(key.folder(tmp_path), {**record, "config": {**record["config"], **free}})
    check_record(study, key, tmp_path)
    other = {**record["config"], "train.epochs": 3.0, "optim.l2": 0.0}
    write_record(key.folder(tmp_path), {**record, "config": other})
    said = f"{tmp_path}/none/seed_0 was run with another config: optim.l2 was 0.0 and is 0.0001; train.epochs was 3.0 "
    with pytest.raises(ValueError, match=re.escape(said + "and is 10.0; restore it or give another --workdir")):
        check_record(study, key, tmp_path)


def test_a_record_that_is_older_than_a_key_continues(study, tmp_path):
    key = RunKey(0, "none")
    record = make_record(study, key)
    del record["config"]["data.decode"]
    write_record(key.folder(tmp_path), record)
    check_record(study, key, tmp_path)
    study.config.data.decode = "fast"
    with pytest.raises(ValueError, match=r"another config: data.decode was 'exact' and is 'fast'; restore it"):
        check_record(study, key, tmp_path)
