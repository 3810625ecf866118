from collections.abc import Callable
from typing import Any

import pytest

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, InvertedResidual, Separable, Spec


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., tuple[MobileNet, dict]]:
    """Make a network of four rows, and its variables, from an activation and options of MobileNet.

    It has plain layers unless the options say otherwise, since they compile fastest.
    """

    def make(activation: str = "relu6", projection_activation: str = "linear", **options) -> tuple[MobileNet, dict]:
        kinds: Any = {"activation": activation, "projection_activation": projection_activation}
        spec = Spec(
            name="tiny",
            stem=Conv(filters=8, stride=2, activation=activation),
            blocks=(
                InvertedResidual(filters=8, expanded=24, **kinds),
                InvertedResidual(filters=12, expanded=32, stride=2, **kinds),
                Separable(filters=16, activation=activation),
            ),
            head=None,
            num_classes=5,
        )
        model = MobileNet(spec, **{"lowering": "plain", **options})
        return model, init_variables(model, seed=0)

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny) -> tuple[MobileNet, dict]:
    return make_tiny()
