"""The statistics and files of a study, from runs that were written by hand."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.ablations import shallow_vs_narrow
from mobilenet_jax.studies.records import write_record
from mobilenet_jax.studies.report import (
    COLUMNS,
    COLUMNS_OF_TIME,
    compare,
    format_csv,
    format_table,
    read_curves,
    read_rows,
    summarise,
    write_report,
)
from mobilenet_jax.studies.study import RunKey, Study, hash_config
from mobilenet_jax.training.config import flatten_config

TOP1 = {"narrow": (0.90, 0.92, 0.91), "shallow": (0.88, 0.905, 0.89), "full": (0.93,)}


@pytest.fixture
def study() -> Study:
    config = shallow_vs_narrow.get_config("digits")
    return Study(name="shallow_vs_narrow", config=config, **shallow_vs_narrow.sweep())


def add_run(study: Study, workdir: Path, key: RunKey, top1: float | None, *, seconds: float = 12.34) -> None:
    """Write the files of a run that ended with `top1`, or that failed (None)."""
    folder = key.folder(workdir)
    status = "failed" if top1 is None else "finished"
    config = flatten_config(study.make_config(key))
    write_record(folder, {"config": config, "status": status, "seconds": seconds, "num_classes": 10})
    (folder / "environment.json").write_text('{"commit": "abc"}')
    lines = [] if top1 is None else [{"step": i, "epoch": i, "eval_ema/top1": top1 * i / 2} for i in (1, 2)]
    lines = [{**line, "time/images_per_second": 100.04 * line["step"]} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if top1 is not None:
        result = {"step": 2, "epoch": 2.0, "loss": 0.5, "top1": top1, "top5": 0.99, "count": 360}
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def workdir(study, tmp_path) -> Path:
    for variant, values in TOP1.items():
        for seed, top1 in enumerate(values):
            add_run(study, tmp_path, RunKey(seed, variant), top1)
    return tmp_path


def test_summary_is_student_s():
    summary = summarise([1.0, 2.0, 3.0])
    assert (summary.count, summary.mean, summary.deviation) == (3, 2.0, 1.0)
    assert summary.half == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)  # t(.975, 2), any table
    assert summarise([1.0, 2.0]).half == pytest.approx(12.706204736432095 * 0.5, rel=1e-9)  # t(.975, 1)
    one = summarise([0.25])
    assert (one.count, one.mean) == (1, 0.25)
    assert math.isnan(one.deviation)
    assert math.isnan(one.half)


def test_intervals_contain_the_true_mean_19_times_in_20():
    samples = np.random.default_rng(0).normal(5, 2, (4000, 3))
    summaries = [summarise(list(sample)) for sample in samples]
    assert np.mean([abs(s.mean - 5) <= s.half for s in summaries]) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    ("file", "content"),
    [("metrics.jsonl", '{"step": 1}\n\0\0\0\n{"step": 2}\n'), ("result.json", '{"step": 2, "to'), ("result.json", "")],
)
def test_a_run_with_a_damaged_file_is_left_out_and_named(study, workdir, caplog, file, content):
    (RunKey(1, "shallow").folder(workdir) / file).write_text(content)
    table = write_report(study, workdir)
    assert table is not None
    assert "Left out, because their files are damaged: shallow seed 1." in table
    assert f"shallow/seed_1/{file}" in caplog.text
    line = next(line for line in table.splitlines() if line.startswith("| shallow"))
    assert line.split(" | ")[3:5] == ["2", "88.50"]
    row = next(row for row in read_rows(study, workdir) if (row["variant"], row["seed"]) == ("shallow", 1))
    assert (row["status"], row["top1"], row["commit"]) == ("damaged", None, None)


def test_pairing_removes_the_effect_of_the_seed():
    base = {0: 90.0, 1: 80.0, 2: 70.0}
    difference = compare({0: 91.0, 1: 81.5, 2: 71.0, 7: 0.0}, base)  # seed 7 has no partner
    assert difference is not None
    assert (difference.count, difference.mean) == (3, pytest.approx(3.5 / 3))
    assert difference.half < 1 < summarise(list(base.values())).half
    assert compare({5: 1.0}, base) is None


def test_rows_hold_the_results_of_the_runs(study, workdir):
    rows = read_rows(study, workdir)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for variant, values in TOP1.items() for seed in range(len(values))
    ]
    shallow = next(row for row in rows if row["variant"] == "shallow")
    assert tuple(shallow) == COLUMNS
    assert shallow == {
        "study": "shallow_vs_narrow",
        "variant": "shallow",
        "seed": 0,
        "status": "finished",
        "params": 3_217_226 - 5 * (512 * 9 + 512 * 512 + 4 * 512),
        "madds": 46_354_432 - 5 * 16 * (512 * 9 + 512 * 512),  # maps of 4x4
        "top1": 0.88,
        "top5": 0.99,
        "loss": 0.5,
        "count": 360,
        "epochs": 2.0,
        "seconds": 12.3,
        "images_per_second": 200.1,
        "config": hash_config(flatten_config(study.make_config(RunKey(5, "shallow")))),
        "commit": "abc",
    }


def test_csv_is_read_back_as_the_same_rows(study, workdir):
    add_run(study, workdir, RunKey(3, "narrow"), None)
    rows = read_rows(study, workdir)
    read = list(csv.DictReader(io.StringIO(format_csv(rows))))
    assert [list(row.values()) for row in read] == [
        ["" if value is None else str(value) for value in row.values()] for row in rows
    ]
    failed = read[3]
    assert (failed["status"], failed["top1"], failed["images_per_second"]) == ("failed", "", "")


def test_table(study, workdir):
    add_run(study, workdir, RunKey(3, "shallow"), None)
    table = format_table(study, read_rows(study, workdir))
    lines = table.splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert cells["narrow (base)"][2:] == ["3", "91.00", "1.00", "88.52 to 93.48", "", "", "68.4"]
    # Differences of -2, -1.5 and -2 points: -1.833 +- 4.3027 * 0.2887 / sqrt(3).
    assert cells["shallow"][2:] == ["3", "89.17", "1.26", "86.04 to 92.29", "-1.83", "-2.55 to -1.12", "65.3"]
    assert cells["full"][2:] == ["1", "93.00", "", "", "+3.00", "", "70.6"]  # one common seed
    assert "Paper: 1704.04861 Tables 5 and 6, V1 on ImageNet." in lines
    assert "Failed, not in the means: shallow seed 3." in lines
    assert "Commit: abc." in lines
    assert lines[-1].startswith("Failed")
    assert "Top-1 on 360 images of digits after 2 epochs." in table


def test_unfinished_runs_are_skipped(study, tmp_path):
    key = RunKey(0, "narrow")
    record = {"config": flatten_config(study.make_config(key)), "status": "started", "seconds": 0, "num_classes": 10}
    write_record(key.folder(tmp_path), record)
    assert read_rows(study, tmp_path) == []
    assert write_report(study, tmp_path) is None
    assert not (tmp_path / "results.csv").exists()
    add_run(study, tmp_path, key, None)
    assert write_report(study, tmp_path) is None  # a failed run has a row, but no table
    assert (tmp_path / "results.csv").read_text().count("\n") == 2
    assert not (tmp_path / "table.md").exists()


def test_curves_are_those_of_the_averaged_variables(study, workdir):
    curves = read_curves(study, workdir)
    assert curves["full"] == [[(1, 0.465), (2, 0.93)]]
    assert [run[-1][1] for run in curves["narrow"]] == [0.90, 0.92, 0.91]


@pytest.mark.parametrize("figure", ["points", "frontier"])
def test_equal_runs_give_equal_files(study, workdir, tmp_path, figure):
    study = Study(**{**vars(study), "figure": figure})
    table = write_report(study, workdir)
    names = ("results.csv", "table.md", "figure.png")
    first = {name: (workdir / name).read_bytes() for name in names}
    assert first["table.md"].decode() == table
    with Image.open(workdir / "figure.png") as image:
        assert image.width >= 900
    for variant, values in reversed(TOP1.items()):  # another order and another speed
        for seed, top1 in reversed(list(enumerate(values))):
            add_run(study, tmp_path / "again", RunKey(seed, variant), top1, seconds=99.0)
    write_report(study, tmp_path / "again")
    second = {name: (tmp_path / "again" / name).read_bytes() for name in names}
    assert {name for name in names if first[name] != second[name]} == {"results.csv"}
    tables = [list(csv.DictReader(io.StringIO(files["results.csv"].decode()))) for files in (first, second)]
    timeless = [[{k: v for k, v in row.items() if k not in COLUMNS_OF_TIME} for row in rows] for rows in tables]
    assert timeless[0] == timeless[1]
    assert not list(workdir.glob("*.tmp"))
