"""The checks of a config: each rule stands here, once.

`RULES` has the valid values of single keys; the functions below it check what several keys mean together. What a
module finds out by reading (a data set, weights, the table of a network) it says itself.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from mobilenet_jax.data.loader import ON_ERROR
from mobilenet_jax.data.transforms import CROPS, INTERPOLATIONS
from mobilenet_jax.training.optim import OPTIMIZERS, SCHEDULES
from mobilenet_jax.training.sharding import PARALLEL


class Rule(NamedTuple):
    """The valid values of a key: a test, and the words that an error uses."""

    holds: Callable[[Any], bool]
    valid: str


def _between(low: float, high: float = math.inf, valid: str = "") -> Rule:
    return Rule(lambda value: low <= value <= high and math.isfinite(value), valid or f"from {low:g} to {high:g}")


def _at_least(low: float, meaning: str = "") -> Rule:
    return _between(low, valid=f"{low:g}{meaning} or more")


def _above(low: float, high: float = math.inf, valid: str = "") -> Rule:
    return Rule(lambda value: low < value <= high and math.isfinite(value), valid or f"a number above {low:g}")


def _one_of(names: Iterable[str]) -> Rule:
    known = tuple(names)
    return Rule(lambda value: value in known, ", ".join(known))


def _pair(holds: Callable[[float, float], bool], valid: str) -> Rule:
    return Rule(lambda value: len(value) == 2 and holds(*value), valid)


def _grey_levels(holds: Callable[[float], bool], valid: str) -> Rule:
    return Rule(lambda value: len(value) == 3 and all(map(holds, value)), valid)


_SHARE = Rule(lambda value: 0 <= value < 1, "from 0 up to, not including, 1")
_OR_NEVER = _at_least(0, " (at the end of the run only)")
_OFF_OR_MORE = _at_least(0, " (off)")

RULES: dict[str, Rule] = {
    "seed": _at_least(0),
    "parallel": _one_of(PARALLEL),
    "model.dtype": _one_of(("float32", "bfloat16")),  # float64 is for tests, in JAX's x64 mode
    "data.image_size": _at_least(1),
    "data.batch_size": _at_least(1),
    "data.eval_batch_size": _at_least(1),
    "data.on_error": _one_of(ON_ERROR),
    "data.holdout": _SHARE,
    "data.workers": _at_least(0),
    "data.crop": _one_of(CROPS),
    "data.area_range": _pair(lambda low, high: 0 < low <= high <= 1, "two rising shares above 0, up to 1"),
    "data.aspect_range": _pair(lambda low, high: 0 < low <= high < math.inf, "two rising numbers above 0"),
    "data.pad": _at_least(0),
    "data.color_jitter": _OFF_OR_MORE,
    "data.randaugment_layers": _OFF_OR_MORE,
    "data.randaugment_magnitude": _between(0, 10),
    "data.randaugment_probability": _between(0, 1),
    "data.erasing": _between(0, 1),
    "data.mixup": _OFF_OR_MORE,
    "data.cutmix": _OFF_OR_MORE,
    "data.mix_probability": _between(0, 1),
    "data.crop_share": _above(0, 1, "above 0, up to 1"),
    "data.interpolation": _one_of(INTERPOLATIONS),
    "data.mean": _grey_levels(math.isfinite, "3 grey levels"),
    "data.std": _grey_levels(lambda value: 0 < value < math.inf, "3 grey levels above 0"),
    "train.epochs": _at_least(0),
    "train.label_smoothing": _SHARE,
    "train.accumulate": _at_least(1),
    "train.recompute_stats_epochs": _OFF_OR_MORE,
    "train.log_every_steps": _at_least(1),
    "train.diagnose_every_steps": _at_least(0, " (never)"),
    "train.eval_every_epochs": _OR_NEVER,
    "train.save_every_epochs": _OR_NEVER,
    "train.keep_checkpoints": _at_least(1),
    "optim.name": _one_of(OPTIMIZERS),
    "optim.schedule": _one_of(SCHEDULES),
    "optim.lr_per_256": _above(0),
    "optim.warmup_epochs": _at_least(0, " (none)"),
    "optim.decay_factor": _above(0, 1, "above 0 and up to 1: 0.99 decays by 1%"),
    "optim.decay_epochs": _above(0),
    "optim.momentum": _SHARE,
    "optim.rms_decay": _SHARE,
    "optim.beta1": _SHARE,
    "optim.beta2": _SHARE,
    "optim.epsilon": _above(0),
    "optim.l2": _at_least(0, " (none)"),
    "optim.weight_decay": _at_least(0, " (none)"),
    "optim.decay_rules": Rule(
        lambda rules: all(_is_decay_rule(rule) for rule in rules), "pairs of a pattern and a factor of 0 or more"
    ),
    "optim.freeze": Rule(lambda value: all(isinstance(p, str) for p in value), "a tuple of patterns: ('^stem/',)"),
    "optim.layer_decay": _above(0, 1, "above 0 and up to 1"),
    "optim.clip_norm": _at_least(0, " (none)"),
    "ema.decay": _SHARE,
}


def _is_decay_rule(rule: Any) -> bool:
    match rule:
        case [str(), int() | float() as factor]:
            return 0 <= factor < math.inf
    return False


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


def check_config(config, *, device_count: int, process_count: int) -> None:
    """Check a whole config. Raises ValueError for the first value that is impossible, in one sentence."""
    check_rules(config)
    train, optim = config.train, config.optim
    if (train.epochs if train.steps is None else train.steps) <= 0:
        raise ValueError("train.steps, or train.epochs where steps is none, must be above 0")
    epochs = optim.freeze_epochs
    if epochs is not None and not (0 <= epochs < math.inf and optim.freeze):
        raise ValueError(
            f"optim.freeze_epochs is {epochs}, optim.freeze {tuple(optim.freeze)}; valid: 0 or more for the patterns "
            "of optim.freeze, or none"
        )
    check_data(config.data)
    if config.data.batch_size % process_count:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}; valid: a multiple of the {process_count} processes"
        )
    check_divides("data.batch_size / train.accumulate", config.data.batch_size / train.accumulate, device_count)
    if train.cache_features:
        check_caches_features(config)
    if train.freeze_stats and train.recompute_stats_epochs:
        raise ValueError(
            f"train.recompute_stats_epochs is {train.recompute_stats_epochs}, train.freeze_stats True; valid: 0 (off), "
            "because it would replace the statistics that are frozen"
        )


def check_data(data_config) -> None:
    """Check the data section by itself. Raises ValueError for the first value that is impossible, in one sentence."""
    check_rules(data_config, "data")
    if data_config.crop == "pad" and data_config.pad >= data_config.image_size:
        raise ValueError(f"data.pad is {data_config.pad}; valid: less than data.image_size, {data_config.image_size}")


def check_divides(key: str, size: float, device_count: int) -> None:
    """Raise ValueError unless the devices can share a training batch of `size` images equally.

    Evaluation has no such rule: the loader rounds its batches up and masks what is too much.
    """
    if size % device_count:
        raise ValueError(f"{key} is {size}; with {device_count} devices it must be a multiple of {device_count}")


def check_caches_features(config) -> None:
    """Raise ValueError if training could see anything else than features that are computed once."""
    data, optim = config.data, config.optim
    random = ("flip", "color_jitter", "randaugment_layers", "erasing", "mixup", "cutmix")
    wrong = [f"data.{key} is {data[key]}" for key in random if data[key]]
    wrong += [f"data.crop is {data.crop!r}"] if data.crop != "resize" else []
    wrong += [f"optim.freeze_epochs is {optim.freeze_epochs}"] if optim.freeze_epochs is not None else []
    wrong += ["train.recompute_stats_epochs is not 0"] if config.train.recompute_stats_epochs else []
    if wrong:
        raise ValueError(
            "train.cache_features sees each image once, uncropped and unchanged, by a network that stays as it is; "
            f"{', '.join(wrong)}; valid: data.crop='resize', none for freeze_epochs, 0 or False for the others"
        )


def check_trains_classifier_alone(frozen: Any, params: Any) -> None:
    """Raise ValueError unless `frozen`, a tree of bools or None, leaves the classifier alone to train."""
    if frozen is None or {name for name in params if not all(jax.tree.leaves(frozen[name]))} != {"classifier"}:
        raise ValueError("train.cache_features trains the classifier alone; set optim.freeze to ('^(?!classifier/)',)")
