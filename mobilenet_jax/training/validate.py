"""The checks of what several keys of a config mean together.

`rules.py` has the valid values of single keys. What a module finds out by reading (a data set, weights, the table of a
network) it says itself.
"""

from typing import Any

import jax

from mobilenet_jax.training.rules import check_rules


def check_config(config, *, device_count: int, process_count: int) -> None:
    """Check a whole config. Raises ValueError for the first value that is impossible, in one sentence."""
    check_rules(config)
    train, optim = config.train, config.optim
    if train.steps is None and not train.epochs:
        raise ValueError("train.epochs is 0; valid: a number above 0, unless train.steps is set")
    epochs = optim.freeze_epochs
    if epochs is not None and not optim.freeze:
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
    if train.quantize is not None:
        check_quantizes(config)
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
    if data_config.cache and data_config.crop != "inception":
        raise ValueError(
            f"data.cache is {data_config.cache!r}, data.crop {data_config.crop!r}; valid: '' unless data.crop is "
            "inception, because other crops keep prepared images, which are smaller"
        )


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
    wrong += ["train.distill.weights is not empty"] if config.train.distill.weights else []
    if wrong:
        raise ValueError(
            "train.cache_features sees each image once, uncropped and unchanged, by a network that stays as it is; "
            f"{', '.join(wrong)}; valid: data.crop='resize', none for freeze_epochs, 0, False or '' for the others"
        )


def check_quantizes(config) -> None:
    """Raise ValueError if a key asks an int8 network for what it does not do."""
    wrong = {
        "init": "is empty" if not config.init else "",
        "model.dtype": f"is {config.model.dtype!r}" if config.model.dtype != "float32" else "",
        "train.cache_features": "is True" if config.train.cache_features else "",
        "train.recompute_stats_epochs": "is not 0" if config.train.recompute_stats_epochs else "",
        "optim.freeze_epochs": "is set" if config.optim.freeze_epochs is not None else "",
    }
    if found := ", ".join(f"{key} {what}" for key, what in wrong.items() if what):
        raise ValueError(
            "train.quantize trains the int8 form of trained weights, with their batch-norm statistics, in float32; "
            f"{found}; valid: weights for init, and the defaults for the others"
        )


def check_trains_classifier_alone(frozen: Any, params: Any) -> None:
    """Raise ValueError unless `frozen`, a tree of bools or None, leaves the classifier alone to train."""
    if frozen is None or {name for name in params if not all(jax.tree.leaves(frozen[name]))} != {"classifier"}:
        raise ValueError("train.cache_features trains the classifier alone; set optim.freeze to ('^(?!classifier/)',)")
