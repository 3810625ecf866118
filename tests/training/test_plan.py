"""Lengths and rates."""

import logging
import math

import numpy as np
import pytest
from runs import make_config

from mobilenet_jax.training import build
from mobilenet_jax.training.plan import make_plan, warn_of_slow_statistics

pytestmark = pytest.mark.usefixtures("one_device")


def test_steps_come_before_epochs_and_may_be_a_share_of_one():
    assert make_plan(make_config(train__steps=None, train__epochs=0.5), 1437).total_steps == math.ceil(1437 / 64)
    assert make_plan(make_config(train__steps=7, train__epochs=100.0), 1437).total_steps == 7


def test_trap_20_an_override_of_the_batch_size_leaves_nothing_stale(tmp_path):
    plans, rates = [], []
    for batch_size in (32, 64):
        config = make_config(data__batch_size=batch_size, train__steps=None, train__epochs=2.0)
        setup = build.build(config, tmp_path / str(batch_size))
        plans.append(setup.plan)
        rates.append(np.asarray(setup.schedule(0)).item())
    assert [plan.total_steps for plan in plans] == [90, 45]
    assert [plan.steps_per_epoch for plan in plans] == [1437 / 32, 1437 / 64]
    assert [(plan.eval_every, plan.save_every) for plan in plans] == [(7, 4), (3, 2)]
    assert rates == pytest.approx([0.4 * 32 / 256, 0.4 * 64 / 256])


@pytest.mark.parametrize(
    ("bn_decay", "steps", "fits"), [(0.9997, 450, False), (0.99, 100, False), (0.9, 450, True), (0.99, 450, True)]
)
def test_trap_17_statistics_too_slow_for_the_run_are_said(caplog, bn_decay, steps, fits):
    warn_of_slow_statistics(bn_decay, steps)
    assert (caplog.text == "") == fits
    if not fits:
        assert f"model.bn_decay = {bn_decay:g}" in caplog.text
        share = float(caplog.text.rpartition(";")[2].split()[0])
        assert share**steps <= 0.011
        caplog.clear()
        warn_of_slow_statistics(share, steps)
        assert caplog.text == ""


def test_trap_17_is_part_of_a_run_with_moving_statistics(tmp_path, caplog):
    slow: dict = {"model__bn_decay": 0.9997, "train__steps": 100}
    for freeze, warned in ((True, False), (False, True)):
        caplog.clear()
        build.build(make_config(**slow, train__freeze_stats=freeze), tmp_path)
        assert ("model.bn_decay = 0.9997" in caplog.text) == warned


def test_more_steps_than_int32_counts_are_refused():
    with pytest.raises(
        ValueError, match=r"train\.epochs is 1000000\.0, which is 312,500,000,000 steps; valid: up to 2,"
    ):
        make_plan(make_config(train__steps=None, train__epochs=1e6), 10**7)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data__batch_size": 2000}, "data.batch_size = 2000 is larger than the training set of 1437 images"),
        (
            {"ema__decay": 0.99},
            "ema.decay = 0.99 averages over about 100 steps, and the run has 12: the average is over",
        ),
        ({"optim__warmup_epochs": 1.0}, "the warm-up of 44.9062 steps outlasts the 12 of the run"),
        ({"model__bn_decay": 0.99}, "model.bn_decay = 0.99 leaves 89% of the initial statistics"),
        ({"ema__decay": 0.5, "model__bn_decay": 0.5}, ""),
    ],
)
def test_a_run_too_short_for_its_recipe_is_said(tmp_path, caplog, values, said):
    build.build(make_config(**values), tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(said in warning for warning in warnings) if said else warnings == []


def test_a_run_says_what_data_it_has(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        build.build(make_config(), tmp_path)
    assert "digits train: 1,437 images in 10 classes" in caplog.messages
    assert "digits test: 360 images in 10 classes" in caplog.messages


def test_a_run_refuses_channels_that_no_data_source_has(tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.in_channels is 1; valid: 3, or none, because every data source gives"
    ):
        build.build(make_config(model__in_channels=1), tmp_path)
    assert build.build(make_config(model__in_channels=3), tmp_path).model.spec.in_channels == 3
