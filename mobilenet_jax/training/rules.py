"""The valid values of each key of a config, in one table that the checks and docs/config.md read.

What several keys mean together is checked in `validate.py`.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from mobilenet_jax.data import CACHES, DECODES
from mobilenet_jax.data.loader import ON_ERROR
from mobilenet_jax.data.transforms import CROPS, INTERPOLATIONS
from mobilenet_jax.models.cpu import IMPLEMENTATIONS
from mobilenet_jax.models.layers import LOWERINGS
from mobilenet_jax.models.options import BLOCK_FORMS, OUTPUT_STRIDES
from mobilenet_jax.models.spec import ACTIVATIONS, INITS, SE_GATES, SE_ROUNDINGS, SHORTCUTS
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS
from mobilenet_jax.training.distill import PREPARATIONS
from mobilenet_jax.training.losses import DIVERGENCES
from mobilenet_jax.training.optim import OPTIMIZERS, SCHEDULES
from mobilenet_jax.training.sharding import PARALLEL
from mobilenet_jax.weights import CLASSIFIERS


class Rule(NamedTuple):
    """The valid values of a key: a test, the words that errors and the documents use, and the unit."""

    holds: Callable[[Any], bool]
    valid: str
    unit: str = ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _format(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _at_least(low: float, meaning: str = "", *, high: float, unit: str = "") -> Rule:
    valid = f"{_format(low)}{meaning} or more, up to {_format(high)}"
    return Rule(lambda value: _is_number(value) and low <= value <= high, valid, unit)


def _above(low: float, *, high: float, unit: str = "") -> Rule:
    valid = f"a number above {_format(low)}, up to {_format(high)}"
    return Rule(lambda value: _is_number(value) and low < value <= high, valid, unit)


def _between(low: float, high: float) -> Rule:
    valid = f"from {_format(low)} to {_format(high)}"
    return Rule(lambda value: _is_number(value) and low <= value <= high, valid)


def _one_of(names: Collection[Any]) -> Rule:
    return Rule(lambda value: value in names, ", ".join(map(str, names)))


def _numbers(count: int, holds: Callable[..., bool], valid: str, unit: str = "") -> Rule:
    """Return the rule of a tuple of `count` numbers, which `holds` tests together."""
    return Rule(
        lambda values: len(values) == count and all(map(_is_number, values)) and holds(*values),
        valid,
        unit,
    )


def _is_decay_rule(rule: Any) -> bool:
    match rule:
        case [str(), int() | float() as factor]:
            return _is_number(factor) and 0 <= factor <= _LARGE
    return False


_LARGE = 1e38  # a bound for numbers that have no other: float32 ends at 3.4e38
_STEPS = 2**31 - 1  # the state counts steps in int32
_PIXELS = 8192
_IMAGES = 2**20
_CLASSES = 1_000_000
_EPOCHS = 1_000_000

_SHARE = Rule(lambda value: _is_number(value) and 0 <= value < 1, "from 0 up to, not including, 1")
_POSITIVE_SHARE = Rule(lambda value: _is_number(value) and 0 < value <= 1, "above 0, up to 1")
_SWITCH = _one_of((False, True))
_TEXT = Rule(lambda value: isinstance(value, str), "text, or empty")
_NAME = Rule(lambda value: isinstance(value, str) and value != "", "text that is not empty")
_OR_NEVER = _at_least(0, " (at the end of the run only)", high=_EPOCHS, unit="epochs")
_OR_NONE = _at_least(0, " (none)", high=_LARGE)
_SIZE = _at_least(1, high=_IMAGES, unit="images")

RULES: dict[str, Rule] = {
    "name": _NAME,
    "seed": _at_least(0, high=2**32 - 1),  # JAX's keys keep 32 bits of a seed
    "parallel": _one_of(PARALLEL),
    "init": _TEXT,
    "init_name": _TEXT,
    "init_select": _TEXT,
    "init_classifier": _one_of(CLASSIFIERS),
    "model.name": _one_of(MODELS),
    "model.width": _above(0, high=16),
    "model.convention": _one_of(CONVENTIONS),
    "model.num_classes": _at_least(1, high=_CLASSES, unit="classes"),
    "model.in_channels": _at_least(1, high=1024, unit="channels"),
    "model.lowering": _one_of(LOWERINGS),
    "model.depthwise_impl": _one_of(IMPLEMENTATIONS),
    "model.dtype": _one_of(("float32", "bfloat16")),  # float64 is for tests, in JAX's x64 mode
    "model.precision": _one_of(("default", "high", "highest")),
    "model.remat": _SWITCH,
    "model.stride_one": Rule(
        lambda rows: all(isinstance(row, int) and 0 <= row < 1000 for row in rows), "a tuple of row numbers", "rows"
    ),
    "model.output_stride": _one_of(OUTPUT_STRIDES),
    "model.activation": _one_of(ACTIVATIONS),
    "model.hard_swish_from": _at_least(0, high=1000, unit="blocks"),
    "model.projection_activation": _one_of(ACTIVATIONS),
    "model.shortcut": _one_of(SHORTCUTS),
    "model.sum_activation": _one_of(ACTIVATIONS),
    "model.expansion": _above(0, high=64),
    "model.se_ratio": _between(0, 1),
    "model.se_rounding": _one_of(SE_ROUNDINGS),
    "model.se_gate": _one_of(SE_GATES),
    "model.block_form": _one_of(BLOCK_FORMS),
    "model.shallow": _SWITCH,
    "model.head_width": _at_least(1, high=100_000, unit="channels"),
    "model.init": _one_of(INITS),
    "model.dropout": _SHARE,
    "model.drop_path": _SHARE,
    "model.drop_path_flat": _SWITCH,
    "model.bn_decay": _SHARE,
    "model.bn_epsilon": _above(0, high=1),
    "data.source": Rule(_NAME.holds, "digits, tfds:NAME, folder, fake:N"),
    "data.data_dir": _TEXT,
    "data.path": _TEXT,
    "data.num_classes": _at_least(1, high=_CLASSES, unit="classes"),
    "data.image_size": _at_least(1, high=_PIXELS, unit="pixels"),
    "data.batch_size": _SIZE,
    "data.eval_batch_size": _SIZE,
    "data.on_error": _one_of(ON_ERROR),
    "data.holdout": _SHARE,
    "data.workers": _at_least(0, high=1024, unit="processes"),
    "data.decode": _one_of(DECODES),
    "data.cache": Rule(lambda value: value in CACHES, "resized, or empty"),
    "data.crop": _one_of(CROPS),
    "data.area_range": _numbers(
        2, lambda low, high: 0 < low <= high <= 1, "two rising shares above 0, up to 1", "share of the area"
    ),
    "data.aspect_range": _numbers(
        2, lambda low, high: 0 < low <= high <= 1000, "two rising numbers above 0, up to 1,000", "width over height"
    ),
    "data.pad": _at_least(0, high=_PIXELS, unit="pixels"),
    "data.flip": _SWITCH,
    "data.color_jitter": _at_least(0, " (off)", high=100),
    "data.randaugment_layers": _at_least(0, " (off)", high=100, unit="operations"),
    "data.randaugment_magnitude": _between(0, 10),
    "data.randaugment_probability": _between(0, 1),
    "data.erasing": _between(0, 1),
    "data.mixup": _at_least(0, " (off)", high=1000),
    "data.cutmix": _at_least(0, " (off)", high=1000),
    "data.mix_probability": _between(0, 1),
    "data.crop_share": _POSITIVE_SHARE,
    "data.interpolation": _one_of(INTERPOLATIONS),
    "data.squash": _SWITCH,
    "data.mean": _numbers(3, lambda *levels: 0 <= min(levels) <= max(levels) <= 255, "3 grey levels", "grey levels"),
    "data.std": _numbers(
        3, lambda *levels: 0 < min(levels) <= max(levels) <= 255, "3 grey levels above 0", "grey levels"
    ),
    "train.epochs": _at_least(0, high=_EPOCHS, unit="epochs"),
    "train.steps": _at_least(1, high=_STEPS, unit="steps"),
    "train.label_smoothing": _SHARE,
    "train.accumulate": _at_least(1, high=_IMAGES, unit="micro-batches"),
    "train.freeze_stats": _SWITCH,
    "train.recompute_stats_epochs": _at_least(0, " (off)", high=_EPOCHS, unit="epochs"),
    "train.cache_features": _SWITCH,
    "train.quantize": _one_of(("int8",)),
    "train.range_decay": _SHARE,
    "train.freeze_ranges_epochs": _at_least(0, " (never)", high=_EPOCHS, unit="epochs"),
    "train.log_every_steps": _at_least(1, high=_STEPS, unit="steps"),
    "train.diagnose_every_steps": _at_least(0, " (never)", high=_STEPS, unit="steps"),
    "train.eval_every_epochs": _OR_NEVER,
    "train.save_every_epochs": _OR_NEVER,
    "train.keep_checkpoints": _at_least(1, high=100_000, unit="checkpoints"),
    "train.distill.weights": _TEXT,
    "train.distill.name": _TEXT,
    "train.distill.prepare": _one_of(PREPARATIONS),
    "train.distill.divergence": _one_of(DIVERGENCES),
    "train.distill.temperature": _above(0, high=1000),
    "train.distill.weight": _POSITIVE_SHARE,
    "optim.name": _one_of(OPTIMIZERS),
    "optim.lr_per_256": _above(0, high=_LARGE),
    "optim.schedule": _one_of(SCHEDULES),
    "optim.warmup_epochs": _at_least(0, " (none)", high=_EPOCHS, unit="epochs"),
    "optim.decay_factor": Rule(
        lambda value: _is_number(value) and 0 < value <= 1, "above 0 and up to 1: 0.99 decays by 1%"
    ),
    "optim.decay_epochs": _above(0, high=_EPOCHS, unit="epochs"),
    "optim.momentum": _SHARE,
    "optim.nesterov": _SWITCH,
    "optim.rms_decay": _SHARE,
    "optim.beta1": _SHARE,
    "optim.beta2": _SHARE,
    "optim.epsilon": _above(0, high=_LARGE),
    "optim.l2": _OR_NONE,
    "optim.weight_decay": _OR_NONE,
    "optim.decay_rules": Rule(
        lambda rules: all(map(_is_decay_rule, rules)), "pairs of a pattern and a factor of 0 or more"
    ),
    "optim.freeze": Rule(lambda value: all(isinstance(p, str) for p in value), "a tuple of patterns: ('^stem/',)"),
    "optim.freeze_epochs": _at_least(0, high=_EPOCHS, unit="epochs"),
    "optim.layer_decay": Rule(lambda value: _is_number(value) and 0 < value <= 1, "above 0 and up to 1"),
    "optim.clip_norm": _OR_NONE,
    "ema.decay": _SHARE,
}


def check_rules(section: Any, prefix: str = "") -> None:
    """Check the keys of a config, or of one section of it called `prefix`, against RULES.

    A key that is none is not set, and is not checked. Raises ValueError, naming the key and the valid values.
    """
    for key, rule in RULES.items():
        if not key.startswith(prefix):
            continue
        value = section
        for part in key.removeprefix(prefix).strip(".").split("."):
            value = value[part]
        if value is not None and not rule.holds(value):
            raise ValueError(f"{key} is {value!r}; valid: {rule.valid}")
