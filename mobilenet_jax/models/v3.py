"""MobileNet V3, large, small and minimalistic: Tables 1 and 2 of 1905.02244, and three width rules."""

from collections.abc import Callable
from dataclasses import dataclass

from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec, SqueezeExcite, make_divisible


@dataclass(frozen=True)
class _Bneck:
    kernel: int
    exp_size: int
    out: int
    se: bool
    nl: str  # HS: hard-swish, RE: ReLU
    s: int


@dataclass(frozen=True)
class _Table:
    rows: tuple[_Bneck, ...]
    head: int  # the 1x1 before the pooling, six times the last row's output
    hidden: int  # the layer behind the pooling


STEM = 16
# 1905.02244, Table 1.
LARGE = _Table(
    rows=(
        # kernel, exp size, out, SE, NL, s
        _Bneck(3, 16, 16, False, "RE", 1),
        _Bneck(3, 64, 24, False, "RE", 2),
        _Bneck(3, 72, 24, False, "RE", 1),
        _Bneck(5, 72, 40, True, "RE", 2),
        _Bneck(5, 120, 40, True, "RE", 1),
        _Bneck(5, 120, 40, True, "RE", 1),
        _Bneck(3, 240, 80, False, "HS", 2),
        _Bneck(3, 200, 80, False, "HS", 1),
        _Bneck(3, 184, 80, False, "HS", 1),
        _Bneck(3, 184, 80, False, "HS", 1),
        _Bneck(3, 480, 112, True, "HS", 1),
        _Bneck(3, 672, 112, True, "HS", 1),
        _Bneck(5, 672, 160, True, "HS", 2),
        _Bneck(5, 960, 160, True, "HS", 1),
        _Bneck(5, 960, 160, True, "HS", 1),
    ),
    head=960,
    hidden=1280,
)
# 1905.02244, Table 2.
SMALL = _Table(
    rows=(
        # kernel, exp size, out, SE, NL, s
        _Bneck(3, 16, 16, True, "RE", 2),
        _Bneck(3, 72, 24, False, "RE", 2),
        _Bneck(3, 88, 24, False, "RE", 1),
        _Bneck(5, 96, 40, True, "HS", 2),
        _Bneck(5, 240, 40, True, "HS", 1),
        _Bneck(5, 240, 40, True, "HS", 1),
        _Bneck(5, 120, 48, True, "HS", 1),
        _Bneck(5, 144, 48, True, "HS", 1),
        _Bneck(5, 288, 96, True, "HS", 2),
        _Bneck(5, 576, 96, True, "HS", 1),
        _Bneck(5, 576, 96, True, "HS", 1),
    ),
    head=576,
    hidden=1024,
)
_NONLINEARITIES = {"RE": "relu", "HS": "hard_swish"}


@dataclass(frozen=True)
class _WidthRule:
    """The way a framework applies the width multiplier to V3."""

    stem: Callable[[float], int]
    expanded: Callable[[_Bneck, int, int, float], int]  # row, its input at width 1, its scaled input, width
    head: Callable[[int, int, float], int]  # table's head, scaled last output, width
    hidden: Callable[[int, float], int]


def _expand_scaled_input(row: _Bneck, table_input: int, channels: int, width: float) -> int:
    return make_divisible(row.exp_size / table_input * channels)


# keras/applications/mobilenet_v3.py: the stem is always 16. timm/models/mobilenetv3.py: `fix_stem` below .75, 1280 at
# every width. torchvision/models/mobilenetv3.py: `adjust_channels` on every absolute number of the table.
_KERAS = _WidthRule(
    stem=lambda width: STEM,
    expanded=_expand_scaled_input,
    head=lambda head, last, width: 6 * last,
    hidden=lambda hidden, width: make_divisible(hidden * width) if width > 1 else hidden,
)
_TIMM = _WidthRule(
    stem=lambda width: STEM if width < 0.75 else make_divisible(STEM * width),
    expanded=_expand_scaled_input,
    head=lambda head, last, width: make_divisible(head * width),
    hidden=lambda hidden, width: hidden,
)
_TORCHVISION = _WidthRule(
    stem=lambda width: make_divisible(STEM * width),
    expanded=lambda row, table_input, channels, width: make_divisible(row.exp_size * width),
    head=lambda head, last, width: 6 * last,
    hidden=lambda hidden, width: make_divisible(hidden * width),
)
_RULES = {"keras": _KERAS, "timm": _TIMM, "timm_tf": _TIMM, "torchvision": _TORCHVISION}


def _blocks(table: _Table, *, width: float, convention: str, minimalistic: bool) -> tuple[InvertedResidual, ...]:
    rule = _RULES[convention]
    blocks, table_input, channels = [], STEM, rule.stem(width)
    for i, row in enumerate(table.rows):
        expanded = rule.expanded(row, table_input, channels, width)
        # Keras and timm leave the expansion out in the first row, torchvision where it would not widen the map.
        expands = expanded != channels if convention == "torchvision" else i > 0
        block = InvertedResidual(
            expanded=expanded if expands else channels,
            expands=expands,
            filters=make_divisible(row.out * width),
            kernel=3 if minimalistic else row.kernel,
            stride=row.s,
            activation="relu" if minimalistic else _NONLINEARITIES[row.nl],
            se=SqueezeExcite() if row.se and not minimalistic else None,
        )
        blocks.append(block)
        table_input, channels = row.out, block.filters
    return tuple(blocks)


def _make_v3(name: str, table: _Table, *, width: float, convention: str, minimalistic: bool) -> Spec:
    rule = _RULES[convention]
    blocks = _blocks(table, width=width, convention=convention, minimalistic=minimalistic)
    activation = "relu" if minimalistic else "hard_swish"
    return Spec(
        name=name,
        stem=Conv(filters=rule.stem(width), stride=2, activation=activation),
        blocks=blocks,
        head=Conv(filters=rule.head(table.head, blocks[-1].filters, width), kernel=1, activation=activation),
        hidden=rule.hidden(table.hidden, width),
        hidden_activation=activation,
        padding="same" if convention in ("keras", "timm_tf") else "symmetric",
        bn_epsilon=1e-5 if convention == "timm" else 1e-3,
        bn_decay={"keras": 0.999, "torchvision": 0.99}.get(convention, 0.9),
        dropout=0.2,  # the paper's "0.8" is the share kept
        slim_stddev=0.008,  # slim's README of V3
        hidden_is_conv=convention != "torchvision",
        classifier_is_conv=convention == "keras",
    )


def mobilenet_v3_large(*, width: float, convention: str) -> Spec:
    """Return V3-Large at a width, by the rule of the convention's framework."""
    return _make_v3("mobilenet_v3_large", LARGE, width=width, convention=convention, minimalistic=False)


def mobilenet_v3_small(*, width: float, convention: str) -> Spec:
    """Return V3-Small at a width, by the rule of the convention's framework."""
    return _make_v3("mobilenet_v3_small", SMALL, width=width, convention=convention, minimalistic=False)


def mobilenet_v3_large_minimalistic(*, width: float, convention: str) -> Spec:
    """Return V3-Large with 3x3 kernels, ReLU and no squeeze-excite (slim's README: for accelerators and int8)."""
    name = "mobilenet_v3_large_minimalistic"
    return _make_v3(name, LARGE, width=width, convention=convention, minimalistic=True)


def mobilenet_v3_small_minimalistic(*, width: float, convention: str) -> Spec:
    """Return V3-Small with 3x3 kernels, ReLU and no squeeze-excite."""
    name = "mobilenet_v3_small_minimalistic"
    return _make_v3(name, SMALL, width=width, convention=convention, minimalistic=True)
