"""Networks of a few layers that together have every construct of the tables."""

from typing import NamedTuple

import jax
import numpy as np

from benchmarks.export_table import draw_variables
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import (
    Conv,
    FusedInvertedResidual,
    InvertedResidual,
    MultiQueryAttention,
    Separable,
    Spec,
    SqueezeExcite,
    UniversalInverted,
)

SIZE = 33  # pixels; odd, so that the paddings of TensorFlow and of PyTorch differ


def _gated(gate: str) -> InvertedResidual:
    return InvertedResidual(filters=8, expanded=16, kernel=5, activation="hard_swish", se=SqueezeExcite(gate=gate))


SPECS = {
    # V2 and V3 as Keras pads them
    "gates": Spec(
        name="gates",
        stem=Conv(filters=8, stride=2, activation="hard_swish"),
        blocks=(
            _gated("hard_sigmoid"),
            InvertedResidual(filters=8, expanded=24, stride=2, activation="relu"),
            _gated("sigmoid"),
            _gated("hard_swish"),
            InvertedResidual(filters=8, expanded=8, expands=False, dilation=2, projection_activation="relu6"),
        ),
        head=Conv(filters=24, kernel=1, activation="hard_swish"),
        hidden=16,
        hidden_activation="hard_swish",
        num_classes=5,
        sum_activation="relu6",
    ),
    # V4, as timm pads it
    "attention": Spec(
        name="attention",
        stem=Conv(filters=8, stride=2, activation="relu"),
        blocks=(
            FusedInvertedResidual(filters=8, expanded=32, stride=2, group_size=8, antialias="blur"),
            UniversalInverted(filters=16, expanded=24, start=3, kernel=5, stride=2, antialias="avg"),
            MultiQueryAttention(filters=16, heads=2, size=12, reduction=2, layer_scale=0.1),
            UniversalInverted(filters=16, expanded=24, start=3, activation="gelu", layer_scale=0.1),
            MultiQueryAttention(filters=16, heads=3, size=8),
        ),
        head=None,
        hidden=16,
        hidden_activation="relu",
        hidden_norm=True,
        num_classes=5,
        padding="symmetric",
    ),
    # V1 as Keras pads it, and shortcuts between expansions
    "shortcuts": Spec(
        name="shortcuts",
        stem=Conv(filters=8, stride=2),
        blocks=(
            Separable(filters=16, stride=2),
            InvertedResidual(filters=8, expanded=32, activation="gelu"),
            InvertedResidual(filters=8, expanded=32),
        ),
        head=None,
        num_classes=0,
        padding="keras_v1",
        shortcut="expansion",
    ),
}


class Network(NamedTuple):
    """A network with the answers that JAX gives for some images."""

    spec: Spec
    variables: dict
    images: np.ndarray  # float32 [3, SIZE, SIZE, 3]
    logits: np.ndarray


def run_networks() -> dict[str, Network]:
    """Return the networks of SPECS by name."""
    found = {}
    images = np.random.default_rng(2).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    for name, spec in SPECS.items():
        variables = draw_variables(spec)
        apply = jax.jit(MobileNet(spec, lowering="plain").apply)
        found[name] = Network(spec, variables, images, np.asarray(apply(variables, images)))
    return found
