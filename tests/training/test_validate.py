"""Each impossible value of a config is one sentence that names the key and the valid values."""

from typing import Any

import pytest

from configs import base
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.rules import RULES, check_rules
from mobilenet_jax.training.validate import check_config, check_divides


def make_config(**changes) -> Any:
    config: Any = base.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def test_the_base_config_is_valid():
    check_config(make_config(), device_count=1, process_count=1)


def test_each_key_has_a_rule_that_accepts_its_default():
    flat = flatten_config(base.get_config())
    assert RULES.keys() == flat.keys()
    for key, rule in RULES.items():
        assert flat[key] is None or rule.holds(flat[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim__name": "adam"}, r"optim\.name is 'adam'; valid: rmsprop, sgd, adamw$"),
        ({"optim__schedule": "step"}, r"optim\.schedule is 'step'; valid: cosine, staircase, constant$"),
        ({"optim__lr_per_256": 0.0}, r"optim\.lr_per_256 is 0\.0; valid: a number above 0"),
        ({"optim__lr_per_256": float("inf")}, r"optim\.lr_per_256 is inf"),
        ({"optim__momentum": 1.0}, r"optim\.momentum is 1\.0; valid: from 0 up to, not including, 1"),
        ({"optim__decay_factor": 1.5}, r"optim\.decay_factor is 1\.5"),
        ({"optim__l2": -1e-5}, r"optim\.l2 is -1e-05; valid: 0 \(none\) or more"),
        ({"optim__weight_decay": float("nan")}, r"optim\.weight_decay is nan"),
        ({"optim__decay_rules": (("kernel$", -1.0),)}, r"optim\.decay_rules is .*; valid: pairs of a pattern"),
        ({"optim__decay_rules": ("kernel$", 1.0)}, r"optim\.decay_rules is .*; valid: pairs of a pattern"),
        ({"optim__freeze": (1,)}, r"optim\.freeze is \(1,\); valid: a tuple of patterns"),
        ({"optim__layer_decay": 0.0}, r"optim\.layer_decay is 0\.0"),
        (
            {"optim__freeze_epochs": 2.0},
            r"optim\.freeze_epochs is 2\.0, optim\.freeze \(\); valid: 0 or more for the patterns",
        ),
        (
            {"train__freeze_stats": True, "train__recompute_stats_epochs": 0.5},
            r"train\.recompute_stats_epochs is 0\.5, train\.freeze_stats True; valid: 0 \(off\)",
        ),
        ({"optim__freeze_epochs": -1.0, "optim__freeze": ("^stem/",)}, r"optim\.freeze_epochs is -1\.0"),
        ({"train__label_smoothing": 1.0}, r"train\.label_smoothing is 1\.0"),
        ({"train__distill__weight": 0.0}, r"train\.distill\.weight is 0\.0; valid: above 0, up to 1$"),
        ({"train__distill__temperature": 0.0}, r"train\.distill\.temperature is 0\.0; valid: a number above 0"),
        ({"train__distill__divergence": "l2"}, r"train\.distill\.divergence is 'l2'; valid: kl, js$"),
        ({"train__distill__prepare": "card"}, r"train\.distill\.prepare is 'card'; valid: teacher, student$"),
        ({"train__epochs": float("nan")}, r"train\.epochs is nan"),
        ({"data__mixup": -0.1}, r"data\.mixup is -0\.1; valid: 0 \(off\) or more"),
        ({"data__cutmix": float("nan")}, r"data\.cutmix is nan"),
        ({"data__mix_probability": 1.5}, r"data\.mix_probability is 1\.5; valid: from 0 to 1"),
        ({"data__mix_probability": -0.1}, r"data\.mix_probability is -0\.1"),
        ({"ema__decay": 1.0}, r"ema\.decay is 1\.0"),
        ({"ema__decay": -0.1}, r"ema\.decay is -0\.1"),
        ({"ema__decay": float("nan")}, r"ema\.decay is nan"),
        ({"data__mixup": float("inf")}, r"data\.mixup is inf; valid: 0 \(off\) or more"),
        ({"data__area_range": (0.5, 0.1)}, r"data\.area_range is \(0\.5, 0\.1\); valid: two rising shares"),
        ({"data__batch_size": 0}, r"data\.batch_size is 0; valid: 1 or more"),
        ({"data__eval_batch_size": 0}, r"data\.eval_batch_size is 0; valid: 1 or more"),
        ({"data__on_error": "ignore"}, r"data\.on_error is 'ignore'; valid: stop, skip$"),
        ({"data__workers": -1}, r"data\.workers is -1; valid: 0 or more"),
        ({"data__holdout": -0.1}, r"data\.holdout is -0\.1; valid: from 0 up to, not including, 1"),
        ({"data__holdout": 1.0}, r"data\.holdout is 1\.0; valid: from 0 up to, not including, 1"),
        ({"data__image_size": 0}, r"data\.image_size is 0; valid: 1 or more"),
        ({"data__crop": "center"}, r"data\.crop is 'center'; valid: inception, pad, resize$"),
        ({"data__decode": "draft"}, r"data\.decode is 'draft'; valid: exact, fast$"),
        ({"data__cache": "disk", "data__crop": "inception"}, r"data\.cache is 'disk'; valid: resized, or empty$"),
        (
            {"data__cache": "resized", "data__crop": "pad"},
            r"data\.cache is 'resized', data\.crop 'pad'; valid: '' unless data\.crop is inception, because",
        ),
        ({"data__interpolation": "lanczos"}, r"data\.interpolation is 'lanczos'; valid: nearest, bilinear, bicubic$"),
        ({"data__crop_share": 0.0}, r"data\.crop_share is 0\.0; valid: above 0, up to 1"),
        ({"data__crop_share": 1.5}, r"data\.crop_share is 1\.5"),
        ({"data__area_range": (0.0, 1.0)}, r"data\.area_range is"),
        (
            {"data__aspect_range": (2.0, 1.0)},
            r"data\.aspect_range is .*; valid: two rising numbers above 0",
        ),
        ({"data__pad": -1}, r"data\.pad is -1; valid: 0 or more"),
        ({"data__color_jitter": -0.1}, r"data\.color_jitter is -0\.1"),
        ({"data__randaugment_layers": -1}, r"data\.randaugment_layers is -1"),
        ({"data__randaugment_magnitude": 11}, r"data\.randaugment_magnitude is 11; valid: from 0 to 10"),
        ({"data__randaugment_probability": 2.0}, r"data\.randaugment_probability is 2\.0; valid: from 0 to 1"),
        ({"data__erasing": 1.1}, r"data\.erasing is 1\.1"),
        ({"data__crop": "pad", "data__pad": 32}, r"data\.pad is 32; valid: less than data\.image_size, 32"),
        ({"seed": 2**32}, r"seed is 4294967296; valid: 0 or more, up to 4,294,967,295"),
        ({"model__width": 1e9}, r"model\.width is 1000000000\.0; valid: a number above 0, up to 16"),
        ({"model__width": float("nan")}, r"model\.width is nan"),
        ({"model__num_classes": 10**12}, r"model\.num_classes is 1000000000000; valid: 1 or more, up to 1,000,000"),
        ({"model__dropout": float("nan")}, r"model\.dropout is nan"),
        (
            {"model__activation": "swish"},
            r"model\.activation is 'swish'; valid: linear, relu, relu6, hard_swish, gelu$",
        ),
        ({"model__stride_one": ("0",)}, r"model\.stride_one is \('0',\); valid: a tuple of row numbers"),
        ({"data__num_classes": 10**12}, r"data\.num_classes is 1000000000000; valid: 1 or more, up to 1,000,000"),
        ({"data__image_size": 10**8}, r"data\.image_size is 100000000; valid: 1 or more, up to 8,192"),
        ({"data__batch_size": 2**31}, r"data\.batch_size is 2147483648; valid: 1 or more, up to 1,048,576"),
        ({"data__eval_batch_size": 2**31}, r"data\.eval_batch_size is 2147483648"),
        ({"data__workers": 10**6}, r"data\.workers is 1000000; valid: 0 or more, up to 1,024"),
        ({"data__mean": ("a", "b", "c")}, r"data\.mean is \('a', 'b', 'c'\); valid: 3 grey levels"),
        ({"data__mean": (0.0, 0.0, 256.0)}, r"data\.mean is"),
        ({"data__std": ("1", "1", "1")}, r"data\.std is \('1', '1', '1'\); valid: 3 grey levels above 0"),
        ({"data__area_range": ("0.1", "1")}, r"data\.area_range is \('0\.1', '1'\); valid: two rising shares"),
        ({"data__aspect_range": (1.0, float("inf"))}, r"data\.aspect_range is \(1\.0, inf\)"),
        ({"data__cutmix": float("inf")}, r"data\.cutmix is inf"),
        ({"train__epochs": float("inf")}, r"train\.epochs is inf"),
        ({"train__steps": 2**31}, r"train\.steps is 2147483648; valid: 1 or more, up to 2,147,483,647"),
        ({"train__recompute_stats_epochs": float("inf")}, r"train\.recompute_stats_epochs is inf"),
        ({"train__eval_every_epochs": float("inf")}, r"train\.eval_every_epochs is inf"),
        ({"train__save_every_epochs": float("inf")}, r"train\.save_every_epochs is inf"),
        ({"optim__warmup_epochs": float("inf")}, r"optim\.warmup_epochs is inf"),
        ({"optim__decay_epochs": float("inf")}, r"optim\.decay_epochs is inf"),
        ({"optim__freeze_epochs": float("inf"), "optim__freeze": ("^stem/",)}, r"optim\.freeze_epochs is inf"),
        ({"optim__lr_per_256": 1e300}, r"optim\.lr_per_256 is 1e\+300"),
        ({"optim__decay_rules": (("kernel$", True),)}, r"optim\.decay_rules is"),
        ({"data__std": (1.0, 0.0, 1.0)}, r"data\.std is \(1\.0, 0\.0, 1\.0\); valid: 3 grey levels above 0"),
    ],
)
def test_impossible_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message) as error:
        check_config(make_config(**change), device_count=1, process_count=1)
    assert "\n" not in str(error.value)


def test_a_pad_that_is_not_used_may_be_large():
    check_config(make_config(data__crop="resize", data__pad=32), device_count=1, process_count=1)


def test_a_section_is_checked_by_itself():
    data = make_config(data__crop="middle").data
    with pytest.raises(ValueError, match=r"data\.crop is 'middle'; valid: "):
        check_rules(data, "data")


@pytest.mark.parametrize("size", [12, 4, 8.5])
def test_batch_size_that_devices_cannot_share_is_refused(size):
    with pytest.raises(ValueError, match=rf"data\.batch_size is {size}; with 8 devices .* multiple of 8"):
        check_divides("data.batch_size", size, 8)


def test_batch_size_that_processes_cannot_share_is_refused():
    config = make_config(data__batch_size=9)
    with pytest.raises(ValueError, match=r"data\.batch_size is 9; valid: a multiple of the 2 processes"):
        check_config(config, device_count=1, process_count=2)
