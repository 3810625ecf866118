"""The checks that stop a run whose numbers are no longer finite, before they are saved."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


class NonFiniteError(RuntimeError):
    """The loss, its gradient or the state of a run is not finite any more."""

    def __init__(self, what: str, step: int, learning_rate: float):
        super().__init__(
            f"{what} at step {step}, learning rate {learning_rate:.4g}; the checkpoints before it are kept: "
            "a lower optim.lr_per_256, a longer optim.warmup_epochs or optim.clip_norm may help"
        )


def find_non_finite(values: Mapping[str, Any]) -> str | None:
    """Return "NAME is VALUE" of the first scalar that is not finite, or None."""
    return next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)


def find_non_finite_leaf(state: Any) -> str | None:
    """Return "PATH is not finite" of the first array of a tree that is not finite, or None.

    A finite gradient times the learning rate can still overflow, and so can a variance.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not np.isfinite(leaf).all():
            return f"{jax.tree_util.keystr(path, simple=True, separator='.')} is not finite"
    return None
