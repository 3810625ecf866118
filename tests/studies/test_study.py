"""The study as data: its file, its configs, its records and its locks."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.ablations import shortcut, width_resolution
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.studies.study import (
    RunKey,
    Study,
    check_record,
    find_runs,
    hash_config,
    lock,
    read_record,
    read_study,
    write_record,
)
from mobilenet_jax.training.config import flatten_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study() -> Study:
    return Study(name="shortcut", config=shortcut.get_config("digits"), **shortcut.sweep())


def make_record(study: Study, key: RunKey, **changes: Any) -> dict[str, Any]:
    return {"config": flatten_config(study.make_config(key)), "status": "started", "seconds": 1.5, **changes}


def test_config_of_a_run_is_the_base_with_variant_and_seed(study):
    config = study.make_config(RunKey(2, "none"))
    assert config.is_locked
    base, flat = flatten_config(study.config), flatten_config(config)
    changed = {key: value for key, value in flat.items() if base[key] != value}
    assert changed == {"model.shortcut": "none", "seed": 2, "name": "shortcut_none"}
    assert flatten_config(study.config) == base  # the base is nobody's to change


def test_all_variants_of_a_seed_come_first(study):
    assert [(key.seed, key.variant) for key in study.list_runs(2, list(study.variants))] == [
        (seed, variant) for seed in (0, 1) for variant in ("bottleneck", "expansion", "none")
    ]
    assert study.list_runs(2, ["none"]) == [RunKey(0, "none"), RunKey(1, "none")]


def test_cost_is_that_of_the_variant_s_network():
    study = Study(name="width_resolution", config=width_resolution.get_config("digits"), **width_resolution.sweep())
    spec = make_spec("mobilenet_v1", width=0.5, num_classes=10, stride_one=(0,))
    assert study.compute_cost("width_0.5_32px", 10).params == compute_cost(spec, 32).params == 823_722
    assert study.compute_cost("width_0.5_32px", 10).madds == 12_167_168  # README, results
    assert study.compute_cost("width_0.5_16px", 10).madds == compute_cost(spec, 16).madds


def test_lines_of_a_frontier_share_a_value(study):
    assert study.group_variants() == {"": ["bottleneck", "expansion", "none"]}
    lines = Study(**{**vars(study), "series": "model.shortcut"}).group_variants()
    assert lines == {
        "model.shortcut None": ["bottleneck"],
        "model.shortcut expansion": ["expansion"],
        "model.shortcut none": ["none"],
    }


SWEEP = {"baseline": "a", "variants": {"a": {}}, "source": ""}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (None, "has no sweep(): it is the config of a run"),
        (
            {"variants": {}},
            "must return a dict of baseline, variants, source, and, if need be, published, figure, series",
        ),
        ({**SWEEP, "serious": ""}, "must return a dict of baseline, variants, source, and"),
        ({**SWEEP, "baseline": "b"}, "is 'b'; valid: a"),
        ({**SWEEP, "figure": "pie"}, "is 'pie'; valid: points, frontier"),
        ({**SWEEP, "published": {"c": 70.6}}, "is 'c'; valid: a"),
        ({**SWEEP, "variants": {"a": {"model.widht": 1.0}}}, "variant a of mine: .*widht"),
        ({**SWEEP, "variants": {"a": {"model.width": "wide"}}}, "variant a of mine: .*width"),
    ],
)
def test_an_ill_formed_sweep_is_one_sentence(tmp_path, sweep, message):
    file = tmp_path / "mine.py"
    file.write_text("" if sweep is None else f"def sweep():\n    return {sweep!r}\n")
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern) as error:
        read_study(f"{file}:digits", shortcut.get_config("digits"))
    assert "\n" not in str(error.value)


def test_the_hash_tells_variants_apart_and_not_seeds_or_places(study):
    flat = flatten_config(study.make_config(RunKey(0, "none")))
    same = {**flat, "seed": 7, "name": "x", "data.data_dir": "/mnt", "data.workers": 4}
    assert hash_config(same) == hash_config(flat)
    assert re.fullmatch("[0-9a-f]{12}", hash_config(flat))
    assert hash_config({**flat, "train.epochs": 11.0}) != hash_config(flat)
    assert len({hash_config(flatten_config(study.make_config(RunKey(0, v)))) for v in study.variants}) == 3


def test_records_of_a_workdir_in_the_order_of_the_sweep(study, tmp_path):
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
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=f"is no record of a run: .*; remove {tmp_path} to run it again") as error:
        read_record(tmp_path)
    assert "\n" not in str(error.value)


def test_another_config_is_refused_by_its_keys(study, tmp_path):
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


def test_a_lock_is_one_process_s_and_dies_with_it(tmp_path):
    path = tmp_path / "run" / "lock"
    code = f"""
import pathlib, time
from mobilenet_jax.study import lock
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
