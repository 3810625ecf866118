import argparse
import csv
import json
from pathlib import Path

import pytest

from benchmarks import distill
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.run import train_and_evaluate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = ["--config.train.steps=2", "--config.data.image_size=16", "--config.model.name=mobilenet_v1"]
TINY += ["--config.model.width=0.1", "--config.model.lowering=plain", "--config.model.shallow=True"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_study_has_a_row_for_each_run_and_the_accuracy_of_the_teacher(tmp_path, capsys):
    train_and_evaluate(load_config(str(CONFIGS / "v3_large.py"), TINY), tmp_path / "teacher")
    known = json.loads((tmp_path / "teacher" / "result.json").read_text())
    command = [f"--config={CONFIGS / 'distill.py'}", f"--teacher={tmp_path / 'teacher'}", "--seeds=1"]
    command += [f"--workdir={tmp_path / 'study'}", "--ways", "alone", "taught", *TINY]
    assert distill.main(command) == 0
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["seed"], row["count"]) for row in rows] == [("alone", "0", "360"), ("taught", "0", "360")]
    lines = {
        way: json.loads((tmp_path / "study" / f"{way}_0" / "metrics.jsonl").read_text().splitlines()[-1])
        for way in ("alone", "taught")
    }
    assert lines["taught"]["train/distill_loss"] == lines["taught"]["train/loss"] > 0
    assert "train/distill_loss" not in lines["alone"]
    table = (tmp_path / "study" / "table.md").read_text()
    assert table.endswith(f"The teacher, mobilenet_v3_large_digits, has {100 * known['top1']:.1f}% of 360.\n")
    assert table in capsys.readouterr().out


def test_a_teacher_that_is_not_there_is_one_sentence(tmp_path, capsys):
    command = [
        f"--config={CONFIGS / 'distill.py'}",
        f"--teacher={tmp_path / 'none'}",
        f"--workdir={tmp_path / 'study'}",
    ]
    assert distill.main(command) == 2
    assert capsys.readouterr().err.startswith(f"there are no weights {tmp_path / 'none'}; valid: ")


@pytest.mark.parametrize("variant", ["digits", "folder"])
def test_the_ways_differ_only_in_the_teacher_and_in_mixing(variant):
    flags = argparse.Namespace(config=f"{CONFIGS / 'distill.py'}:{variant}", teacher="t")
    made = {way: distill.make_config(way, seed=1, flags=flags, overrides=[]) for way in distill.WAYS}
    alone, mixed, taught = (flatten_config(config) for config in made.values())
    assert {key for key in taught if taught[key] != mixed[key]} == {"name", "train.distill.weights"}
    assert {key for key in mixed if mixed[key] != alone[key]} == {"name", "data.mixup"}
    assert (alone["train.distill.weights"], taught["train.distill.weights"], taught["seed"]) == ("", "t", 1)
