"""MobileNet V2: 1801.04381, Table 2, and its width rule."""

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


def mobilenet_v2(*, width: float, convention: str) -> Spec:
    """V2 at a width: outputs are scaled and rounded, expansions are `t` times the scaled input.

    The last 1x1 is never narrower than 1280 (1801.04381 sec. 6.1: multipliers below 1 spare the last layer).
    """

    def scale(channels: int) -> int:
        # Keras truncates before it rounds (keras/applications/mobilenet_v2.py: `int(filters * alpha)`).
        return make_divisible(int(channels * width) if convention == "keras" else channels * width)

    stem = make_divisible(STEM * width)
    blocks, channels = [], stem
    for row in TABLE:
        for i in range(row.n):
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
        name="mobilenet_v2",
        stem=Conv(filters=stem, stride=2),
        blocks=tuple(blocks),
        head=Conv(filters=make_divisible(HEAD * max(1.0, width)), kernel=1),
        padding="same" if same else "symmetric",
        bn_epsilon=1e-3 if same else 1e-5,
        bn_decay=0.999 if convention == "keras" else 0.9,
        dropout=0.2,  # slim's keep_prob .8
    )
