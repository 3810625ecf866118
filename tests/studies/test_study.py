"""The study as data: its file, and the configs of its runs."""

import re

import pytest

from configs.ablations import shortcut, width_resolution
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.studies.study import RunKey, Study, hash_config, read_study
from mobilenet_jax.training.config import flatten_config


@pytest.fixture
def study() -> Study:
    return Study(name="shortcut", config=shortcut.get_config("digits"), **shortcut.sweep())


def test_config_of_a_run_is_the_base_with_variant_and_seed(study):
    config = study.make_config(RunKey(2, "none"))
    assert config.is_locked
    base, flat = flatten_config(study.config), flatten_config(config)
    changed = {key: value for key, value in flat.items() if base[key] != value}
    assert changed == {"model.shortcut": "none", "seed": 2, "name": "shortcut_none"}
    assert flatten_config(study.config) == base  # the base itself stays unchanged


def test_all_variants_are_run_with_one_seed_before_the_next(study):
    assert [(key.seed, key.variant) for key in study.list_runs(2, list(study.variants))] == [
        (seed, variant) for seed in (0, 1) for variant in ("bottleneck", "expansion", "none")
    ]
    assert study.list_runs(2, ["none"]) == [RunKey(0, "none"), RunKey(1, "none")]


def test_cost_is_computed_for_the_network_and_image_size_of_the_variant():
    study = Study(name="width_resolution", config=width_resolution.get_config("digits"), **width_resolution.sweep())
    spec = make_spec("mobilenet_v1", width=0.5, num_classes=10, stride_one=(0,))
    assert study.compute_cost("width_0.5_32px", 10).params == compute_cost(spec, 32).params == 823_722
    assert study.compute_cost("width_0.5_32px", 10).madds == 12_167_168  # README, results
    assert study.compute_cost("width_0.5_16px", 10).madds == compute_cost(spec, 16).madds


def test_variants_on_a_line_of_a_frontier_share_a_value(study):
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
            "must return a dict with baseline, variants, source, and optionally published, figure, series",
        ),
        ({**SWEEP, "serious": ""}, "must return a dict with baseline, variants, source, and"),
        ({**SWEEP, "baseline": "b"}, "is 'b'; valid: a"),
        ({**SWEEP, "figure": "pie"}, "is 'pie'; valid: points, frontier"),
        ({**SWEEP, "published": {"c": 70.6}}, "is 'c'; valid: a"),
        ({**SWEEP, "variants": {"a": {"model.widht": 1.0}}}, "variant a of mine: .*widht"),
        ({**SWEEP, "variants": {"a": {"model.width": "wide"}}}, "variant a of mine: .*width"),
    ],
)
def test_an_invalid_sweep_is_refused_in_one_sentence(tmp_path, sweep, message):
    file = tmp_path / "mine.py"
    file.write_text("" if sweep is None else f"def sweep():\n    return {sweep!r}\n")
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern) as error:
        read_study(f"{file}:digits", shortcut.get_config("digits"))
    assert "\n" not in str(error.value)


def test_the_hash_differs_between_variants_and_not_between_seeds_or_paths(study):
    flat = flatten_config(study.make_config(RunKey(0, "none")))
    same = {**flat, "seed": 7, "name": "x", "data.data_dir": "/mnt", "data.workers": 4}
    assert hash_config(same) == hash_config(flat)
    assert re.fullmatch("[0-9a-f]{12}", hash_config(flat))
    assert hash_config({**flat, "train.epochs": 11.0}) != hash_config(flat)
    assert len({hash_config(flatten_config(study.make_config(RunKey(0, v)))) for v in study.variants}) == 3
