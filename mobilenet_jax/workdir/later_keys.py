"""Keys that configs have got since the first runs were stored: a stored config is compared with a new one."""

from collections.abc import Mapping
from typing import Any

# The value of each key is what runs did before the key existed.
LATER_KEYS: dict[str, Any] = {
    "init_classifier": "keep",
    "init_select": "",
    "model.in_channels": None,
    "model.precision": "default",
    "data.decode": "exact",
    "data.cache": "",
    "train.quantize": None,
    "train.range_decay": 0.99,
    "train.freeze_ranges_epochs": 1.0,
    "train.distill.weights": "",
    "train.distill.name": "",
    "train.distill.prepare": "teacher",
    "train.distill.divergence": "kl",
    "train.distill.temperature": 1.0,
    "train.distill.weight": 1.0,
}


def complete(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored flat config with the keys that it is too old to have."""
    return {**LATER_KEYS, **stored}
