import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mobilenet_jax.cli.config import apply_preprocessing, load_config, split_overrides
from mobilenet_jax.training.config import flatten_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def keep_path(monkeypatch):
    """Loading a config puts its folder on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("--config.model.stride_one=(0,1)", "model", "stride_one", (0, 1)),
        ("--config.data.area_range=(.5,1.0)", "data", "area_range", (0.5, 1.0)),
        ("--config.optim.freeze=('^stem/',)", "optim", "freeze", ("^stem/",)),
        ("--config.model.se_ratio=0.5", "model", "se_ratio", 0.5),
        ("--config.data.flip=true", "data", "flip", True),
        ("--config.train.epochs=5", "train", "epochs", 5.0),
    ],
)
def test_overrides_take_the_type_of_the_key(override, section, key, value):
    found = load_config(str(ROOT / "configs" / "v1.py"), [override])[section][key]
    assert found == value
    assert type(found) is type(value)


def test_overrides_are_told_from_flags_wherever_they_stand():
    argv = ["--config.a=1", "--config", "x.py", "--config.b.c=2", "--workdir=w"]
    assert split_overrides(argv) == (["--config", "x.py", "--workdir=w"], ["--config.a=1", "--config.b.c=2"])


@pytest.mark.parametrize(
    ("argv", "arguments", "overrides"),
    [
        (["--config.a", "64", "--workdir", "w"], ["--workdir", "w"], ["--config.a=64"]),
        (["--config.a", "-1", "--config.b", "(1, 2)"], [], ["--config.a=-1", "--config.b=(1, 2)"]),
        (["--config.a=1", "x"], ["x"], ["--config.a=1"]),
        (["--config.a", "--config.b", "2"], [], ["--config.a", "--config.b=2"]),
        (["--config.a", "--workdir", "w"], ["--workdir", "w"], ["--config.a"]),
        (["--config.a"], [], ["--config.a"]),
        (["--config.a", "1=2", "3"], ["3"], ["--config.a=1=2"]),
    ],
)
def test_the_value_of_an_override_may_be_the_next_argument(argv, arguments, overrides):
    assert split_overrides(argv) == (arguments, overrides)


def test_a_flat_config_is_what_its_json_says():
    config = ConfigDict({"a": {"b": (1, 2.5), "c": {"d": None}}, "e": "x", "empty": {}})
    flat = flatten_config(config)
    assert flat == {"a.b": [1, 2.5], "a.c.d": None, "e": "x"}
    assert json.loads(json.dumps(flat)) == flat


def test_images_are_prepared_as_the_card_says_but_for_what_is_overridden():
    config = ConfigDict({"data": {"image_size": 32, "mean": (0.0,), "std": (1.0,)}})
    card = {"preprocessing": {"image_size": 224, "mean": [127.5], "std": [58.0]}}
    apply_preprocessing(config, card, ["--config.data.std=2.0", "--config.data.mean_other=1"])
    assert config.to_dict()["data"] == {"image_size": 224, "mean": (127.5,), "std": (1.0,)}
