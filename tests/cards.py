"""The card of weights that a test makes up."""

from typing import Any

from mobilenet_jax.models.spec import Spec
from mobilenet_jax.weights.card import HALF, make_card


def make_test_card(spec: Spec, **changes: Any) -> dict:
    """Return the card of a network, whose classes have no names; `changes` are arguments of `make_card`."""
    given: dict[str, Any] = {
        "name": "tiny",
        "model": spec.name,
        "width": 1.0,
        "convention": "keras",
        "preprocessing": HALF,
        "class_names": None,
        "source": {"file": "w", "sha256": "0"},
    }
    return make_card(spec=spec, **{**given, **changes})
