"""MobileNet-EdgeTPU, versions 1 and 2: tensorflow/models official/projects/edgetpu/vision, as timm builds them.

No paper has their tables; the rows follow timm's `efficientnet.py: _gen_mobilenet_edgetpu`.
"""

from dataclasses import dataclass

from mobilenet_jax.models.spec import Conv, FusedInvertedResidual, InvertedResidual, Row, Spec, make_divisible


@dataclass(frozen=True)
class _Bottleneck:
    kernel: int
    e: int  # expansion factor
    c: int
    s: int
    n: int = 1
    fused: bool = False
    group_size: int = 0  # channels in each group of a fused convolution; 0: one group
    skip: bool = True


@dataclass(frozen=True)
class _Table:
    stem: int
    stem_kernel: int
    pointwise: int  # channels of the 1x1 behind the stem: an inverted bottleneck without expansion
    rows: tuple[_Bottleneck, ...]
    head: int = 1280


V1 = _Table(
    stem=32,
    stem_kernel=3,
    pointwise=16,
    rows=(
        # kernel, e, c, s, n
        _Bottleneck(3, 8, 32, 2, fused=True),
        _Bottleneck(3, 4, 32, 1, 3, fused=True),
        _Bottleneck(3, 8, 48, 2, fused=True),
        _Bottleneck(3, 4, 48, 1, 3, fused=True),
        _Bottleneck(3, 8, 96, 2),
        _Bottleneck(3, 4, 96, 1, 3),
        _Bottleneck(3, 8, 96, 1, skip=False),
        _Bottleneck(3, 4, 96, 1, 3),
        _Bottleneck(5, 8, 160, 2),
        _Bottleneck(5, 4, 160, 1, 3),
        _Bottleneck(3, 8, 192, 1),
    ),
)


def _rows_v2(c: tuple[int, ...], group_size: int) -> tuple[_Bottleneck, ...]:
    """Return the rows of version 2, whose sizes share one shape; `c` are the channels of the stages behind the 1x1."""
    return (
        # kernel, e, c, s, n
        _Bottleneck(3, 8, c[0], 2, fused=True),
        _Bottleneck(3, 4, c[0], 1, fused=True, group_size=group_size),
        _Bottleneck(3, 8, c[1], 2, fused=True),
        _Bottleneck(3, 4, c[1], 1, fused=True, group_size=group_size),
        _Bottleneck(3, 4, c[1], 1, fused=True),
        _Bottleneck(3, 4, c[1], 1, fused=True, group_size=group_size),
        _Bottleneck(3, 8, c[2], 2, fused=True),
        _Bottleneck(3, 4, c[2], 1, 3),
        _Bottleneck(3, 8, c[3], 1),
        _Bottleneck(3, 4, c[3], 1, 3),
        _Bottleneck(3, 8, c[4], 2),
        _Bottleneck(3, 4, c[4], 1, 3),
        _Bottleneck(3, 8, c[5], 1),
    )


TABLES = {
    "edgetpu_100": V1,
    "edgetpu_v2_xs": _Table(32, 3, 16, _rows_v2((32, 48, 96, 144, 160, 192), 64)),
    "edgetpu_v2_s": _Table(64, 5, 24, _rows_v2((48, 64, 128, 160, 192, 256), 64)),
    "edgetpu_v2_m": _Table(64, 5, 32, _rows_v2((64, 80, 160, 192, 240, 320), 64), head=1344),
    "edgetpu_v2_l": _Table(64, 7, 32, _rows_v2((64, 96, 192, 240, 256, 384), 128), head=1408),
}


def _expand_table(table: _Table, width: float) -> tuple[Row, ...]:
    pointwise = Conv(filters=make_divisible(table.pointwise * width), kernel=1, activation="relu")
    blocks: list[Row] = [pointwise]
    channels = pointwise.filters
    for row in table.rows:
        for i in range(row.n):
            block = _make_row(row, channels, make_divisible(row.c * width), first=i == 0)
            blocks.append(block)
            channels = block.filters
    return tuple(blocks)


def _make_row(row: _Bottleneck, channels: int, filters: int, *, first: bool) -> Row:
    expanded, stride = make_divisible(row.e * channels), row.s if first else 1
    if row.fused:
        return FusedInvertedResidual(
            filters=filters, expanded=expanded, kernel=row.kernel, stride=stride, group_size=row.group_size
        )
    return InvertedResidual(
        filters=filters, expanded=expanded, kernel=row.kernel, stride=stride, skip=row.skip, activation="relu"
    )


def mobilenet_edgetpu(size: str, *, width: float, convention: str) -> Spec:
    """Return a size of `TABLES` at a width, by timm's rule: everything except the head is scaled and rounded.

    Raises ValueError for a width at which the groups of version 2 do not divide the channels.
    """
    table = TABLES[size]
    stem = make_divisible(table.stem * width)
    same = convention in ("keras", "timm_tf")
    return Spec(
        name=f"mobilenet_{size}",
        stem=Conv(filters=stem, kernel=table.stem_kernel, stride=2, activation="relu"),
        blocks=_expand_table(table, width),
        head=Conv(filters=table.head, kernel=1, activation="relu"),
        padding="same" if same else "symmetric",
        bn_epsilon=1e-3 if same else 1e-5,
        bn_decay=0.99 if convention == "keras" else 0.9,
        dropout=0.2,
    )
