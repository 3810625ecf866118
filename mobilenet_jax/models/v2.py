"""MobileNet V2: Table 2 of 1801.04381, and its width rule."""

import math
from dataclasses import dataclass

from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec, make_divisible


@dataclass(frozen=True)
class _Bottlenecks:
    t: int  # expansion factor
    c: int  # output channels
    n: int  # repeats
    s: int  # stride of the first


# 1801.04381, Table 2.
STEM = 32
TABLE = (
    # t, c, n, s
    _Bottlenecks(1, 16, 1, 1),
    _Bottlenecks(6, 24, 2, 2),
    _Bottlenecks(6, 32, 3, 2),
    _Bottlenecks(6, 64, 4, 2),
    _Bottlenecks(6, 96, 3, 1),
    _Bottlenecks(6, 160, 3, 2),
    _Bottlenecks(6, 320, 1, 1),
)
HEAD = 1280


def mobilenet_v2(*, width: float, convention: str, depth: float = 1.0) -> Spec:
    """Return V2 at a width: outputs are scaled and rounded, expansions are `t` times the scaled input.

    The last 1x1 is never narrower than 1280 (1801.04381 sec. 6.1: multipliers below 1 spare the last layer). `depth`
    above 1 multiplies the repeats in all lines of the table except the first and the last; stem and last 1x1 then
    stay as at width 1. These are timm's `mobilenetv2_110d` (width 1.1, depth 1.2) and `120d` (width 1.2, depth 1.4).
    """

    def scale(channels: int) -> int:
        # Keras truncates before it rounds (keras/applications/mobilenet_v2.py: `int(filters * alpha)`).
        return make_divisible(int(channels * width) if convention == "keras" else channels * width)

    stem = STEM if depth > 1 else make_divisible(STEM * width)
    blocks, channels = [], stem
    for row in TABLE:
        for i in range(row.n if row in (TABLE[0], TABLE[-1]) else math.ceil(row.n * depth)):
            block = InvertedResidual(
                expanded=row.t * channels,
                expands=row.t != 1,
                filters=scale(row.c),
                stride=row.s if i == 0 else 1,
            )
            blocks.append(block)
            channels = block.filters
    same = convention in ("keras", "timm_tf")
    return Spec(
        name="mobilenet_v2" if depth == 1 else f"mobilenet_v2_deep_x{depth:g}",
        stem=Conv(filters=stem, stride=2),
        blocks=tuple(blocks),
        head=Conv(filters=HEAD if depth > 1 else make_divisible(HEAD * max(1.0, width)), kernel=1),
        padding="same" if same else "symmetric",
        bn_epsilon=1e-3 if same else 1e-5,
        bn_decay=0.999 if convention == "keras" else 0.9,
        dropout=0.2,  # slim's keep_prob .8
    )
