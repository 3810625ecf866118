import csv
import importlib
from pathlib import Path

import pytest

from configs import v2
from mobilenet_jax.data.sources import DataInfo
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.studies.plan import Work, estimate_time, estimate_work
from mobilenet_jax.studies.study import RunKey, Study

STUDIES = Path(__file__).resolve().parents[2] / "docs" / "studies"


def test_time_is_estimated_from_finished_runs_if_there_are_any():
    a, b, c = RunKey(0, "a"), RunKey(1, "a"), RunKey(0, "b")
    work = {a: Work(10.0, 5.0), b: Work(10.0, 5.0), c: Work(40.0, 20.0)}
    # The second run of a variant finds its programs compiled.
    assert estimate_time(work, [a, b, c], {}) == (
        "time: about 85 seconds, estimated for two cores, with start, compilation and evaluation"
    )
    # A finished run of the same variant counts first, otherwise the estimate times the ratio of the finished runs.
    assert estimate_time(work, [b, c], {a: 60.0}) == "time: about 5 minutes, estimated from 1 finished runs"
    assert estimate_time(work, [], {a: 60.0}) == "nothing is left to do"


@pytest.mark.parametrize("name", ["linear_bottleneck", "shortcut", "width"])
def test_the_estimate_is_within_a_factor_of_two_of_a_measured_study(name):
    """The recorded studies ran on Fashion-MNIST."""
    with (STUDIES / name / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    module = importlib.import_module(f"configs.ablations.{name}")
    study = Study(name=name, config=module.get_config("fashion_mnist"), **module.sweep())
    data = DataInfo(10, (), 60_000, 10_000)
    costs = {row["variant"]: study.compute_cost(row["variant"], 10) for row in rows}
    assert all(costs[row["variant"]].madds == int(row["madds"]) for row in rows)
    work = [estimate_work(study.make_config(RunKey(0, row["variant"])), costs[row["variant"]], data) for row in rows]
    estimated = sum(w.run + w.compilation * (row["seed"] == "0") for w, row in zip(work, rows, strict=True))
    assert 0.5 < estimated / sum(float(row["seconds"]) for row in rows) < 2


def test_the_estimate_of_a_short_run_has_start_and_compilation():
    """configs/datasets.py: the digits take about 90 seconds on two cores; compiling, 17 of them (performance.md)."""
    config, data = v2.get_config(), DataInfo(10, (), 1437, 360)
    cost = compute_cost(make_spec("mobilenet_v2", width=0.5, num_classes=10, stride_one=(0,)), 32)
    work = estimate_work(config, cost, data)
    assert 17 < work.compilation < 34
    assert 45 < work.run + work.compilation < 180
    config.train.steps = 1
    assert estimate_work(config, cost, data).run < 7
    config.train.recompute_stats_epochs = 1.0
    assert estimate_work(config, cost, data).run > 5.5
