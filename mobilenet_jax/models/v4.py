"""MobileNet V4, convolutional and hybrid: the architectures in the appendix of 2404.10518.

Rows, activations, layer scale and width rule follow timm's `mobilenetv3.py: _gen_mobilenet_v4`.
"""

from dataclasses import dataclass, replace

from mobilenet_jax.models.spec import (
    Conv,
    FusedInvertedResidual,
    MultiQueryAttention,
    Row,
    Spec,
    UniversalInverted,
    make_divisible,
)


@dataclass(frozen=True)
class _Conv:
    kernel: int
    c: int
    s: int


@dataclass(frozen=True)
class _Fused:
    kernel: int
    e: int
    c: int
    s: int


@dataclass(frozen=True)
class _Uib:
    start: int  # kernel of the first depthwise, "DW K1"; 0: none
    middle: int  # kernel of the second depthwise, "DW K2"; 0: none
    e: int  # expansion factor
    c: int
    s: int
    n: int = 1  # repeats; only the first has the stride


@dataclass(frozen=True)
class _Mqa:
    heads: int
    size: int
    reduction: int
    c: int


_TableRow = _Conv | _Fused | _Uib | _Mqa


@dataclass(frozen=True)
class _Table:
    stem: int
    rows: tuple[_TableRow, ...]
    activation: str = "relu"
    layer_scale: float = 0.0
    antialias: str = ""


HEAD = 960
HIDDEN = 1280

CONV_SMALL = _Table(
    stem=32,
    rows=(
        # kernel, c, s
        _Conv(3, 32, 2),
        _Conv(1, 32, 1),
        _Conv(3, 96, 2),
        _Conv(1, 64, 1),
        # start, middle, e, c, s
        _Uib(5, 5, 3, 96, 2),
        _Uib(0, 3, 2, 96, 1, n=4),
        _Uib(3, 0, 4, 96, 1),
        _Uib(3, 3, 6, 128, 2),
        _Uib(5, 5, 4, 128, 1),
        _Uib(0, 5, 4, 128, 1),
        _Uib(0, 5, 3, 128, 1),
        _Uib(0, 3, 4, 128, 1, n=2),
    ),
)
CONV_MEDIUM = _Table(
    stem=32,
    rows=(
        # kernel, e, c, s
        _Fused(3, 4, 48, 2),
        # start, middle, e, c, s
        _Uib(3, 5, 4, 80, 2),
        _Uib(3, 3, 2, 80, 1),
        _Uib(3, 5, 6, 160, 2),
        _Uib(3, 3, 4, 160, 1, n=2),
        _Uib(3, 5, 4, 160, 1),
        _Uib(3, 3, 4, 160, 1),
        _Uib(3, 0, 4, 160, 1),
        _Uib(0, 0, 2, 160, 1),
        _Uib(3, 0, 4, 160, 1),
        _Uib(5, 5, 6, 256, 2),
        _Uib(5, 5, 4, 256, 1),
        _Uib(3, 5, 4, 256, 1, n=2),
        _Uib(0, 0, 4, 256, 1),
        _Uib(3, 0, 4, 256, 1),
        _Uib(3, 5, 2, 256, 1),
        _Uib(5, 5, 4, 256, 1),
        _Uib(0, 0, 4, 256, 1, n=2),
        _Uib(5, 0, 2, 256, 1),
    ),
)
CONV_LARGE = _Table(
    stem=24,
    rows=(
        # kernel, e, c, s
        _Fused(3, 4, 48, 2),
        # start, middle, e, c, s
        _Uib(3, 5, 4, 96, 2),
        _Uib(3, 3, 4, 96, 1),
        _Uib(3, 5, 4, 192, 2),
        _Uib(3, 3, 4, 192, 1, n=3),
        _Uib(3, 5, 4, 192, 1),
        _Uib(5, 3, 4, 192, 1, n=5),
        _Uib(3, 0, 4, 192, 1),
        _Uib(5, 5, 4, 512, 2, n=4),
        _Uib(5, 0, 4, 512, 1),
        _Uib(5, 3, 4, 512, 1),
        _Uib(5, 0, 4, 512, 1, n=2),
        _Uib(5, 3, 4, 512, 1),
        _Uib(5, 5, 4, 512, 1),
        _Uib(5, 0, 4, 512, 1, n=3),
    ),
)
HYBRID_MEDIUM = _Table(
    stem=32,
    rows=(
        # kernel, e, c, s
        _Fused(3, 4, 48, 2),
        # start, middle, e, c, s | heads, size, reduction, c
        _Uib(3, 5, 4, 80, 2),
        _Uib(3, 3, 2, 80, 1),
        _Uib(3, 5, 6, 160, 2),
        _Uib(0, 0, 2, 160, 1),
        _Uib(3, 3, 4, 160, 1),
        _Uib(3, 5, 4, 160, 1),
        _Mqa(4, 64, 2, 160),
        _Uib(3, 3, 4, 160, 1),
        _Mqa(4, 64, 2, 160),
        _Uib(3, 0, 4, 160, 1),
        _Mqa(4, 64, 2, 160),
        _Uib(3, 3, 4, 160, 1),
        _Mqa(4, 64, 2, 160),
        _Uib(3, 0, 4, 160, 1),
        _Uib(5, 5, 6, 256, 2),
        _Uib(5, 5, 4, 256, 1),
        _Uib(3, 5, 4, 256, 1, n=2),
        _Uib(0, 0, 2, 256, 1),
        _Uib(3, 5, 2, 256, 1),
        _Uib(0, 0, 2, 256, 1),
        _Uib(0, 0, 4, 256, 1),
        _Mqa(4, 64, 1, 256),
        _Uib(3, 0, 4, 256, 1),
        _Mqa(4, 64, 1, 256),
        _Uib(5, 5, 4, 256, 1),
        _Mqa(4, 64, 1, 256),
        _Uib(5, 0, 4, 256, 1),
        _Mqa(4, 64, 1, 256),
        _Uib(5, 0, 4, 256, 1),
    ),
    layer_scale=1e-5,
)
HYBRID_LARGE = _Table(
    stem=24,
    rows=(
        # kernel, e, c, s
        _Fused(3, 4, 48, 2),
        # start, middle, e, c, s | heads, size, reduction, c
        _Uib(3, 5, 4, 96, 2),
        _Uib(3, 3, 4, 96, 1),
        _Uib(3, 5, 4, 192, 2),
        _Uib(3, 3, 4, 192, 1, n=3),
        _Uib(3, 5, 4, 192, 1),
        _Uib(5, 3, 4, 192, 1, n=2),
        *(3 * (_Mqa(8, 48, 2, 192), _Uib(5, 3, 4, 192, 1))),
        _Mqa(8, 48, 2, 192),
        _Uib(3, 0, 4, 192, 1),
        _Uib(5, 5, 4, 512, 2, n=4),
        _Uib(5, 0, 4, 512, 1),
        _Uib(5, 3, 4, 512, 1),
        _Uib(5, 0, 4, 512, 1, n=2),
        _Uib(5, 3, 4, 512, 1),
        _Uib(5, 5, 4, 512, 1),
        *(4 * (_Mqa(8, 64, 1, 512), _Uib(5, 0, 4, 512, 1))),
    ),
    activation="gelu",
    layer_scale=1e-5,
)


def _expand_table(table: _Table, channels: int, width: float) -> tuple[Row, ...]:
    blocks: list[Row] = []
    for row in table.rows:
        for i in range(row.n if isinstance(row, _Uib) else 1):
            block = _make_row(row, table, channels, make_divisible(row.c * width), first=i == 0)
            blocks.append(block)
            channels = block.filters
    return tuple(blocks)


def _make_row(row: _TableRow, table: _Table, channels: int, filters: int, *, first: bool) -> Row:
    if isinstance(row, _Conv):
        return Conv(filters=filters, kernel=row.kernel, stride=row.s, activation=table.activation)
    if isinstance(row, _Mqa):
        return MultiQueryAttention(
            filters=filters,
            heads=row.heads,
            size=row.size,
            reduction=row.reduction,
            layer_scale=table.layer_scale,
        )
    expanded = make_divisible(row.e * channels)
    if isinstance(row, _Fused):
        return FusedInvertedResidual(
            filters=filters,
            expanded=expanded,
            kernel=row.kernel,
            stride=row.s,
            activation=table.activation,
            antialias=table.antialias,
        )
    return UniversalInverted(
        filters=filters,
        expanded=expanded,
        start=row.start,
        kernel=row.middle,
        stride=row.s if first else 1,
        activation=table.activation,
        layer_scale=table.layer_scale,
        antialias=table.antialias,
    )


TABLES = {
    "conv_small": CONV_SMALL,
    "conv_medium": CONV_MEDIUM,
    "conv_large": CONV_LARGE,
    "hybrid_medium": HYBRID_MEDIUM,
    "hybrid_large": HYBRID_LARGE,
    # Relatives in timm: a fixed filter behind a convolution of stride 1 takes the stride.
    "conv_aa_medium": replace(CONV_MEDIUM, antialias="avg"),
    "conv_aa_large": replace(CONV_LARGE, antialias="avg"),
    "conv_blur_medium": replace(CONV_MEDIUM, antialias="blur"),
}


def mobilenet_v4(size: str, *, width: float, convention: str) -> Spec:
    """Return V4 of a size of `TABLES` at a width, by timm's rule.

    Outputs are scaled and rounded; expansions are multiples of the scaled input. Below width 1 the stem keeps its
    channels (`fix_stem`). The 1280 units of the hidden layer and the heads of attention stay at every width. Google's
    own code (conventions keras and timm_tf) pads as TensorFlow and has epsilon 1e-3 (tensorflow/models
    official/vision/configs/experiments).
    """
    table = TABLES[size]
    stem = table.stem if width < 1 else make_divisible(table.stem * width)
    same = convention in ("keras", "timm_tf")
    return Spec(
        name=f"mobilenet_v4_{size}",
        stem=Conv(filters=stem, stride=2, activation=table.activation),
        blocks=_expand_table(table, stem, width),
        head=Conv(filters=make_divisible(HEAD * width), kernel=1, activation=table.activation),
        hidden=HIDDEN,
        hidden_activation=table.activation,
        hidden_norm=True,
        hidden_is_conv=True,
        padding="same" if same else "symmetric",
        bn_epsilon=1e-3 if same else 1e-5,
        bn_decay=0.99 if convention == "keras" else 0.9,
        dropout=0.2,
    )
