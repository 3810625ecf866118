"""Options: functions from one `Spec` to another, by the names that configs and the command line use. No JAX here.

To add an option, write a function here, list it in `OPTIONS` and add its key to `configs/base.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from mobilenet_jax.models.spec import (
    Conv,
    InvertedResidual,
    MultiQueryAttention,
    Residual,
    Row,
    Separable,
    Spec,
    SqueezeExcite,
    check_choice,
    make_divisible,
)

BLOCK_FORMS = ("regular", "separable", "linear_bottleneck", "inverted_residual")
OUTPUT_STRIDES = (8, 16, 32)


def map_rows(spec: Spec, change: Callable[[Row], Row]) -> Spec:
    """Apply `change` to stem, blocks and head."""
    head = change(spec.head) if spec.head else None
    blocks = tuple(change(row) for row in spec.blocks)
    return replace(spec, stem=change(spec.stem), blocks=blocks, head=head)  # pyright: ignore[reportArgumentType]


def _map_inverted(spec: Spec, option: str, change: Callable[[InvertedResidual], InvertedResidual]) -> Spec:
    if not any(isinstance(row, InvertedResidual) for row in spec.blocks):
        raise ValueError(f"{option} does not apply to {spec.name}: it has no inverted residual blocks")
    return map_rows(spec, lambda row: change(row) if isinstance(row, InvertedResidual) else row)


def with_activation(spec: Spec, activation: str) -> Spec:
    """Set one activation wherever the table has one; linear projections, squeeze-excite and attention stay."""

    def change(row: Row) -> Row:
        return row if isinstance(row, MultiQueryAttention) else replace(row, activation=activation)

    spec = map_rows(spec, change)
    return replace(spec, hidden_activation=activation) if spec.hidden else spec


def with_hard_swish_from(spec: Spec, first: int) -> Spec:
    """Set hard-swish in the blocks from number `first` on (the first block is 0), and ReLU in those before it.

    Stem and last layers stay. In V3-Large, 6 is the table (h-swish from 80 channels on), and 0 and 10 are
    "h-swish @16" and "@112" of 1905.02244 Table 5.
    """
    if first not in range(len(spec.blocks) + 1):
        raise ValueError(f"hard_swish_from is {first}; {spec.name} has {len(spec.blocks)} blocks: 0 to that is valid")
    late = with_activation(spec, "hard_swish").blocks[first:]
    return replace(spec, blocks=with_activation(spec, "relu").blocks[:first] + late)


def with_projection_activation(spec: Spec, activation: str) -> Spec:
    """Set the activation of projections: `linear` is V2's bottleneck, `relu6` the ablation of 1801.04381 Fig. 6a."""
    change = lambda row: replace(row, projection_activation=activation)  # noqa: E731
    return _map_inverted(spec, "projection_activation", change)


def with_shortcut(spec: Spec, shortcut: str) -> Spec:
    """Put residuals between bottlenecks, between expansions, or nowhere (1801.04381 Fig. 6b).

    `expansion` adds a block's activated depthwise output to the next block's activated expansion if their shapes
    agree. In V2 at width 1 this happens ten times, as often as between bottlenecks.
    """
    return replace(_map_inverted(spec, "shortcut", lambda row: row), shortcut=shortcut)


def with_sum_activation(spec: Spec, activation: str) -> Spec:
    """Set an activation behind the sum of each residual; with relu6 projections as well, no map is linear."""
    return replace(_map_inverted(spec, "sum_activation", lambda row: row), sum_activation=activation)


def with_expansion(spec: Spec, factor: float) -> Spec:
    """Set one expansion factor in every row that expands; factor 1 leaves their expansion convolution out."""
    if factor <= 0:
        raise ValueError(f"expansion is {factor}; valid: above 0")
    spec = _map_inverted(spec, "expansion", lambda row: row)
    blocks, channels = [], spec.stem.filters
    for row in spec.blocks:
        if isinstance(row, InvertedResidual) and row.expands:
            expanded = channels if factor == 1 else make_divisible(factor * channels)
            row = replace(row, expanded=expanded, expands=factor != 1)
        blocks.append(row)
        channels = row.filters
    return replace(spec, blocks=tuple(blocks))


def with_se_ratio(spec: Spec, ratio: float) -> Spec:
    """Set the ratio of reduced to expanded channels where the table has squeeze-excite, or everywhere if nowhere.

    Ratio 0 removes squeeze-excite.
    """
    everywhere = not any(isinstance(row, InvertedResidual) and row.se for row in spec.blocks)

    def change(row: InvertedResidual) -> InvertedResidual:
        if ratio == 0 or not (row.se or everywhere):
            return replace(row, se=None)
        return replace(row, se=replace(row.se or SqueezeExcite(), ratio=ratio))

    return _map_inverted(spec, "se_ratio", change)


def _with_se_field(option: str, field: str) -> Callable[[Spec, str], Spec]:
    def with_field(spec: Spec, value: str) -> Spec:
        if not any(isinstance(row, InvertedResidual) and row.se for row in spec.blocks):
            raise ValueError(f"{option} does not apply to {spec.name}: it has no squeeze-excite; set se_ratio")
        change = lambda row: replace(row, se=replace(row.se, **{field: value}) if row.se else None)  # noqa: E731
        return _map_inverted(spec, option, change)

    return with_field


def with_block_form(spec: Spec, form: str) -> Spec:
    """Give every block one of the four forms of 1801.04381 Fig. 2, with the channels and strides of the table.

    `regular` is one full convolution (V1 in this form: 1704.04861 Table 4). `separable` is V1's depthwise and
    pointwise. `linear_bottleneck` is V2 without its residuals: 2c and 2d are the same layers when stacked.
    `inverted_residual` is V2.
    """
    check_choice("block_form", form, BLOCK_FORMS)

    def change(row: Row) -> Row:
        inverted = isinstance(row, InvertedResidual)
        if inverted and form in ("linear_bottleneck", "inverted_residual"):
            return replace(row, skip=row.skip and form == "inverted_residual")
        if (isinstance(row, Separable) or (inverted and not row.se)) and form in ("regular", "separable"):
            return (Conv if form == "regular" else Separable)(
                filters=row.filters,
                kernel=row.kernel,
                stride=row.stride,
                dilation=row.dilation,
                activation=row.activation,
            )
        having = " with squeeze-excite (se_ratio=0 removes it)" if inverted else ""
        raise ValueError(
            f"block_form {form!r} does not apply to {spec.name}: it has {type(row).__name__} blocks{having}"
        )

    return replace(spec, blocks=tuple(change(row) for row in spec.blocks))


def with_shallow(spec: Spec, shallow: bool) -> Spec:
    """Leave out the longest run of equal blocks; in V1 these are the five of 14x14x512 (1704.04861 Table 5)."""
    runs = [list(run) for _, run in groupby(range(len(spec.blocks)), key=lambda i: spec.blocks[i])]
    longest = max(runs, key=len)
    if shallow and len(longest) == 1:
        raise ValueError(f"shallow does not apply to {spec.name}: it has no two equal blocks in a row")
    kept = (row for i, row in enumerate(spec.blocks) if not (shallow and i in longest))
    return replace(spec, blocks=tuple(kept))


def with_head_width(spec: Spec, width: int) -> Spec:
    """Set the channels of the last layer before the classifier: the hidden layer (V3, V4) or the last 1x1 (V2)."""
    if width < 1:
        raise ValueError(f"head_width is {width}; valid: 1 or more")
    if spec.hidden:
        return replace(spec, hidden=width)
    if spec.head is None:
        raise ValueError(f"head_width does not apply to {spec.name}: its classifier sees the last block")
    return replace(spec, head=replace(spec.head, filters=width))


def with_stride_one(spec: Spec, which: tuple[int, ...]) -> Spec:
    """Set stride 1 in the given stride-2 rows, counted from the stem (0), so that small images keep useful maps.

    The CIFAR versions of V1 use (0,): images of 32 px arrive at the pooling as maps of 2x2 instead of 1x1.
    """
    count = sum(row.stride == 2 for _, row, _ in spec.rows())
    if bad := [i for i in which if i not in range(count)]:
        raise ValueError(f"stride_one has {bad[0]}; {spec.name} has {count} stride-2 rows: 0 to {count - 1} are valid")
    seen = iter(range(count))

    def change(row: Row) -> Row:
        return _without_stride(row) if row.stride == 2 and next(seen) in which else row

    stem = change(spec.stem)
    return replace(spec, stem=stem, blocks=tuple(change(row) for row in spec.blocks))  # pyright: ignore[reportArgumentType]


def _without_stride(row: Row, **changes: int) -> Row:
    if isinstance(row, Residual):
        # A row that had no residual because of its stride does not gain one.
        return replace(row, stride=1, skip=False, **changes)
    return replace(row, stride=1, **changes)


def with_output_stride(spec: Spec, output_stride: int) -> Spec:
    """Replace strides beyond `output_stride` by dilation, with the same weights (1801.04381 sec. 6.3; slim's rule).

    The row whose stride is taken away keeps the dilation so far; in the rows behind it the dilation doubles.
    """
    check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    stride, dilation, blocks = spec.stem.stride, 1, []
    for row in spec.blocks:
        if row.stride == 2 and stride == output_stride:
            blocks.append(_without_stride(row, dilation=dilation))
            dilation *= 2
        else:
            blocks.append(replace(row, dilation=dilation))
            stride *= row.stride
    return replace(spec, blocks=tuple(blocks))


def with_in_channels(spec: Spec, channels: int) -> Spec:
    """Give the stem another number of input channels; 3 are red, green and blue."""
    if channels < 1:
        raise ValueError(f"in_channels is {channels}; valid: 1 or more")
    return replace(spec, in_channels=channels)


def _with_field(field: str) -> Callable[..., Spec]:
    return lambda spec, value: replace(spec, **{field: value})


# The options of `create_model`, of the config's model section and of the command line. They are applied in this order:
# squeeze-excite is sized after the expansion, blocks take other forms when their channels are known, and dilation
# follows the strides.
OPTIONS: dict[str, Callable[..., Spec]] = {
    "activation": with_activation,
    "hard_swish_from": with_hard_swish_from,
    "projection_activation": with_projection_activation,
    "shortcut": with_shortcut,
    "sum_activation": with_sum_activation,
    "expansion": with_expansion,
    "se_ratio": with_se_ratio,
    "se_rounding": _with_se_field("se_rounding", "rounding"),
    "se_gate": _with_se_field("se_gate", "gate"),
    "block_form": with_block_form,
    "shallow": with_shallow,
    "head_width": with_head_width,
    "stride_one": with_stride_one,
    "output_stride": with_output_stride,
    "in_channels": with_in_channels,
    "init": _with_field("init"),
    "dropout": _with_field("dropout"),
    "drop_path": _with_field("drop_path"),
    "drop_path_flat": _with_field("drop_path_flat"),
    "bn_decay": _with_field("bn_decay"),
    "bn_epsilon": _with_field("bn_epsilon"),
}


def apply_options(spec: Spec, **options: object) -> Spec:
    """Apply every option that is not None; raise ValueError for an unknown or impossible one."""
    for key in options:
        check_choice("model option", key, tuple(OPTIONS))
    for key, change in OPTIONS.items():
        if options.get(key) is not None:
            spec = change(spec, options[key])
    return spec
