"""MobileNet V1: Table 1 of 1704.04861, and its width rules."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mobilenet_jax.models.spec import Conv, Separable, Spec, make_divisible


@dataclass(frozen=True)
class _Body:
    stride: int
    filters: int


# 1704.04861, Table 1. A row here is the pair "Conv dw / s", "Conv / s1" of the paper. The last "dw / s2" of the paper
# is a misprint: its output of 7x7, and every implementation, have stride 1.
STEM = 32
TABLE = (
    # s, c
    _Body(1, 64),
    _Body(2, 128),
    _Body(1, 128),
    _Body(2, 256),
    _Body(1, 256),
    _Body(2, 512),
    _Body(1, 512),
    _Body(1, 512),
    _Body(1, 512),
    _Body(1, 512),
    _Body(1, 512),
    _Body(2, 1024),
    _Body(1, 1024),
)

# Channels at a width. Keras truncates (`int(filters * alpha)`, keras/applications/mobilenet.py), PyTorch code
# rounds to 8; they agree at .25, .5, .75, 1, 1.25 and 1.5.
_SCALE: dict[str, Callable[[float], int]] = {
    "keras": int,
    "timm": make_divisible,
    "timm_tf": make_divisible,
    "torchvision": make_divisible,
}


def mobilenet_v1(*, width: float, convention: str) -> Spec:
    """Return V1 at a width, as the framework of `convention` builds it; raise ValueError if no channel is left."""
    scale = _SCALE[convention]
    if scale(STEM * width) < 1:
        raise ValueError(f"width is {width}: the stem would have no channel; valid: from {1 / STEM}")
    return Spec(
        name="mobilenet_v1",
        stem=Conv(filters=scale(STEM * width), stride=2),
        blocks=tuple(Separable(filters=scale(row.filters * width), stride=row.stride) for row in TABLE),
        head=None,
        padding={"keras": "keras_v1", "timm_tf": "same"}.get(convention, "symmetric"),
        bn_epsilon=1e-3 if convention in ("keras", "timm_tf") else 1e-5,
        bn_decay=0.99 if convention == "keras" else 0.9,
        dropout=1e-3,  # slim's keep_prob .999; Keras' default
        classifier_is_conv=convention == "keras",
    )


def mobilenet_v1_headconv(*, width: float, convention: str) -> Spec:
    """Return timm's `mobilenetv1_100h`: V1 with a last 1x1 of 1024 channels, or more above width 1."""
    head = Conv(filters=max(1024, make_divisible(1024 * width)), kernel=1)
    return replace(mobilenet_v1(width=width, convention=convention), name="mobilenet_v1_headconv", head=head)
