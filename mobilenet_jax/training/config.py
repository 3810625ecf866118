"""The reading of a config by a run: flat keys, and values that come from the card of weights."""

import functools
import json
import operator
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

# Keys that a config may leave at none, and the place of their values in the card of the weights that the run starts
# from.
CARD_KEYS = {
    "model.name": ("model",),
    "model.width": ("width",),
    "model.convention": ("convention",),
    "data.image_size": ("preprocessing", "image_size"),
    "data.crop_share": ("preprocessing", "crop_share"),
    "data.interpolation": ("preprocessing", "interpolation"),
    "data.squash": ("preprocessing", "squash"),
    "data.mean": ("preprocessing", "mean"),
    "data.std": ("preprocessing", "std"),
}


def flatten_config(config) -> dict[str, Any]:
    """Return {"optim.name": "sgd", ...}, with values as a round trip through JSON gives them."""

    def walk(section: dict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return json.loads(json.dumps(dict(walk(config.to_dict(), ""))))


def follow_card(config, read_card: Callable[[], dict]):
    """Return the config with every key of CARD_KEYS that is none filled from a card.

    `read_card` is called only if such a key exists; the caller's config is not changed. Raises ValueError if there is
    such a key but `init` names no weights.
    """
    flat = flatten_config(config)
    missing = [key for key in CARD_KEYS if flat[key] is None]
    if not missing:
        return config
    if not config.init:
        raise ValueError(f"{', '.join(missing)} are none: as the weights have them; set init to weights, or these keys")
    config, card = config.copy_and_resolve_references(), read_card()
    for key in missing:
        value = functools.reduce(operator.getitem, CARD_KEYS[key], card)
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return config


def warn_of_other_preprocessing(config, card: dict) -> None:
    """Log each key of the data section that differs from the card of the weights: another mean costs accuracy."""
    flat = flatten_config(config)
    theirs = {key: card["preprocessing"][path[1]] for key, path in CARD_KEYS.items() if path[0] == "preprocessing"}
    differences = [f"{key} is {flat[key]}, there {value}" for key, value in theirs.items() if flat[key] != value]
    if differences:
        logging.warning("init %s was trained with other preprocessing: %s", config.init, "; ".join(differences))
