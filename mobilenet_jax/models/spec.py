"""Architectures as data: rows, the network they form, and functions from one network to another. No JAX here.

A `Spec` is a network with every integer resolved. It is walked twice: by `network.py`, which builds modules,
and by `cost.py`, which counts. Both see the same `Op`s, so what is counted is what runs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import get_args, get_origin, get_type_hints

ACTIVATIONS = ("linear", "relu", "relu6", "hard_swish", "gelu")
PADDINGS = ("same", "symmetric", "keras_v1")
SHORTCUTS = ("bottleneck", "expansion", "none")
BLOCK_FORMS = ("regular", "separable", "linear_bottleneck", "inverted_residual")
SE_GATES = ("hard_sigmoid", "sigmoid", "hard_swish")
SE_ROUNDINGS = ("div8", "int")
INITS = ("he", "slim")
ANTIALIASES = ("", "avg", "blur")


def check_choice(key: str, value: object, valid: tuple) -> None:
    """Raise ValueError naming `key` and the valid values unless `value` is one of them."""
    if value not in valid:
        raise ValueError(f"{key} is {value!r}; valid: {', '.join(map(str, valid))}")


def check_share(key: str, value: float, *, below: float = 1.0) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if not 0 <= value < below:
        raise ValueError(f"{key} is {value}; valid: from 0 to below {below:g}")


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round to the nearest multiple of `divisor`, at least one, and never below 90% of `value`.

    Source: `make_divisible` of tensorflow/models slim `mobilenet.py`, shared by Keras, timm and torchvision.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def pads(size: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """Zeros (before, after) along one axis of `size` pixels.

    `same` is TensorFlow's rule, `symmetric` PyTorch's (k - 1) // 2, `end` the (0, 1) of Keras' MobileNet V1.
    """
    reach = dilation * (kernel - 1)
    if padding == "same":
        total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        return total // 2, total - total // 2
    if padding == "symmetric":
        return reach // 2, reach // 2
    return 0, 1


@dataclass(frozen=True, kw_only=True)
class Op:
    """One convolution as it runs, with the batch norm and activation behind it."""

    name: str  # path inside its row: "expand", "se/reduce"
    in_channels: int
    filters: int
    kernel: int = 1  # 0: no convolution, only what would be behind it
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    split: int = 1  # channel groups of a convolution that is not depthwise
    norm: bool = True
    bias: bool = False
    scale: float = 0.0  # what a learned factor for each channel starts at; 0: there is none
    activation: str = "linear"
    pooled: bool = False  # runs on the spatial mean: squeeze-excite, the layers behind the pooling
    antialias: str = ""  # a fixed filter of stride 2 that takes the place of the convolution: avg | blur
    rewinds: bool = False  # reads a map of the row's input size, whatever the op before it left

    @property
    def groups(self) -> int:
        """Channel groups: one a channel in a depthwise convolution."""
        return self.in_channels if self.depthwise else self.split

    @property
    def kernel_elements(self) -> int:
        """Elements of the kernel, which are the multiply-adds of an output pixel."""
        return self.kernel**2 * self.in_channels // self.groups * self.filters

    @property
    def params(self) -> int:
        """Trainable elements: kernel, batch norm's scale and offset, bias, layer scale."""
        return self.kernel_elements + self.filters * (2 * self.norm + self.bias + (self.scale != 0))

    def pads(self, height: int, width: int, padding: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros ((top, bottom), (left, right)) for a map of `height` x `width`."""
        if padding == "keras_v1":
            padding = "end" if self.depthwise and self.stride == 2 else "same"
        return tuple(pads(n, self.kernel, self.stride, self.dilation, padding) for n in (height, width))  # pyright: ignore[reportReturnType]

    def output_size(self, height: int, width: int, padding: str) -> tuple[int, int]:
        """Height and width behind the op; ValueError where nothing would be left."""
        if self.antialias:  # avg: pairs of pixels; blur: every second pixel with its neighbours, padded
            more = 1 if self.antialias == "blur" else 0
            return (height + more) // 2, (width + more) // 2
        if not self.kernel:
            return height, width
        reach = self.dilation * (self.kernel - 1)
        before_after = self.pads(height, width, padding)
        out = tuple(
            (n + sum(p) - reach - 1) // self.stride + 1 for n, p in zip((height, width), before_after, strict=True)
        )
        if min(out) < 1:
            raise ValueError(
                f"a map of {height}x{width} is too small for a {self.kernel}x{self.kernel} convolution "
                f"of stride {self.stride}: use a larger image_size"
            )
        return out[0], out[1]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A full convolution, batch norm, activation: the stem and the last 1x1."""

    filters: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    activation: str = "relu6"

    def __post_init__(self):
        _check_row(self)

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """The convolution alone; its name is empty, for it has the row's own."""
        return (
            Op(
                name="",
                in_channels=in_channels,
                filters=self.filters,
                kernel=self.kernel,
                stride=self.stride,
                dilation=self.dilation,
                activation=self.activation,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Separable:
    """V1's block: depthwise, then pointwise, each with batch norm and activation (1704.04861, Fig. 3)."""

    filters: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    activation: str = "relu6"

    def __post_init__(self):
        _check_row(self)

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Depthwise and pointwise."""
        return (
            _depthwise(self, in_channels),
            Op(name="pointwise", in_channels=in_channels, filters=self.filters, activation=self.activation),
        )


@dataclass(frozen=True, kw_only=True)
class SqueezeExcite:
    """Channel gates from the spatial mean: reduce, ReLU, expand, gate (1905.02244, sec. 5.3)."""

    ratio: float = 0.25
    rounding: str = "div8"
    gate: str = "hard_sigmoid"

    def __post_init__(self):
        check_choice("se_rounding", self.rounding, SE_ROUNDINGS)
        check_choice("se_gate", self.gate, SE_GATES)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"se_ratio is {self.ratio}; valid: above 0, up to 1 (0 removes squeeze-excite)")

    def channels(self, expanded: int) -> int:
        """Reduced channels for `expanded` ones."""
        if self.rounding == "div8":
            return make_divisible(expanded * self.ratio)
        return max(1, int(expanded * self.ratio))


@dataclass(frozen=True, kw_only=True)
class Residual:
    """What the rows with a residual share."""

    filters: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    skip: bool = True  # may have a residual, where stride and channels allow one

    def has_residual(self, in_channels: int) -> bool:
        """Whether input and output can be added, and the table adds them."""
        return self.skip and self.stride == 1 and in_channels == self.filters


@dataclass(frozen=True, kw_only=True)
class InvertedResidual(Residual):
    """V2's and V3's block: expand, depthwise, gate, project (1801.04381 Table 1, 1905.02244 Fig. 4)."""

    expanded: int
    expands: bool = True  # false: no expansion convolution, `expanded` is the input's width
    activation: str = "relu6"
    projection_activation: str = "linear"
    se: SqueezeExcite | None = None

    def __post_init__(self):
        _check_row(self)
        check_choice("projection_activation", self.projection_activation, ACTIVATIONS)

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Expansion, depthwise, the two of squeeze-excite, projection: those the row has, in order."""
        ops = []
        if self.expands:
            expand = Op(name="expand", in_channels=in_channels, filters=self.expanded, activation=self.activation)
            ops.append(expand)
        ops.append(_depthwise(self, self.expanded))
        if self.se:
            reduced = self.se.channels(self.expanded)
            squeeze = _dense("se/reduce", self.expanded, reduced)
            ops += [squeeze, _dense("se/expand", reduced, self.expanded)]
        project = Op(
            name="project",
            in_channels=self.expanded,
            filters=self.filters,
            activation=self.projection_activation,
        )
        return (*ops, project)


@dataclass(frozen=True, kw_only=True)
class FusedInvertedResidual(Residual):
    """Expansion and depthwise in one full convolution, then the projection (EfficientNet-EdgeTPU, 2003.02838).

    Accelerators run it faster than the two it replaces where channels are few.
    """

    expanded: int
    group_size: int = 0  # expanded channels a group of the convolution; 0: one group
    activation: str = "relu"
    antialias: str = ""  # avg | blur: a fixed filter takes the stride, the convolution has none

    def __post_init__(self):
        _check_row(self)
        if self.group_size and self.expanded % self.group_size:
            raise ValueError(f"group_size is {self.group_size}; valid: a divisor of the {self.expanded} channels")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Fused expansion and projection; ValueError where the groups do not divide the input."""
        split = self.expanded // self.group_size if self.group_size else 1
        if in_channels % split:
            raise ValueError(
                f"the {in_channels} input channels of a fused bottleneck do not divide into its {split} groups"
            )
        expand = Op(
            name="expand",
            in_channels=in_channels,
            filters=self.expanded,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            split=split,
            activation=self.activation,
        )
        return *_antialias(self, expand), Op(name="project", in_channels=self.expanded, filters=self.filters)


@dataclass(frozen=True, kw_only=True)
class UniversalInverted(Residual):
    """V4's block: an inverted bottleneck with two optional depthwise convolutions (2404.10518).

    Both: extra depthwise. The middle one, `kernel`: inverted bottleneck. The first, `start`: ConvNext-like. None:
    feed-forward.
    """

    expanded: int
    start: int = 0  # kernel of the depthwise before the expansion; 0: none. It has no activation
    kernel: int = 0  # of the depthwise behind the expansion; 0: none. It has the stride, if it is there
    activation: str = "relu"
    layer_scale: float = 0.0  # what learned factors on the branch start at (2103.17239 sec. 2); 0: there are none
    antialias: str = ""  # avg | blur: a fixed filter takes the stride, the convolution has none

    def __post_init__(self):
        _check_row(self, self.start, self.kernel, least=0)
        if self.stride == 2 and not (self.start or self.kernel):
            raise ValueError(f"impossible row {self}: without a depthwise convolution only stride 1 is valid")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """First depthwise, expansion, middle depthwise, projection, layer scale: those the row has, in order."""
        middle = _depthwise(self, self.expanded)
        start = replace(middle, name="start/depthwise", in_channels=in_channels, filters=in_channels)
        start = replace(start, kernel=self.start, stride=1 if self.kernel else self.stride, activation="linear")
        ops = [
            *_antialias(self, start),
            Op(name="expand", in_channels=in_channels, filters=self.expanded, activation=self.activation),
            *_antialias(self, middle),
            Op(name="project", in_channels=self.expanded, filters=self.filters),
        ]
        return *ops, *_layer_scale(self)


@dataclass(frozen=True, kw_only=True)
class MultiQueryAttention(Residual):
    """V4's mobile attention: many query heads, one key and value, on a smaller map (2404.10518)."""

    heads: int
    size: int  # channels of a head's queries, of the key and of the value
    reduction: int = 1  # stride of the depthwise convolutions before key and value; 1: there are none
    layer_scale: float = 0.0

    def __post_init__(self):
        _check_row(self)
        if self.heads < 1 or self.size < 1 or self.reduction not in (1, 2) or self.stride != 1:
            raise ValueError(f"impossible row {self}: heads and size >= 1, reduction 1 or 2, stride 1 are valid")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Norm; query, key and value, each of the norm's output; output, of the attended map; layer scale."""
        wide = self.heads * self.size
        ops = [
            Op(name="norm", in_channels=in_channels, filters=in_channels, kernel=0),
            _projection("query", in_channels, wide, rewinds=True),
        ]
        for name in ("key", "value"):
            if self.reduction > 1:
                reduce = replace(_depthwise(self, in_channels), name=f"{name}/depthwise", stride=self.reduction)
                ops.append(replace(reduce, rewinds=True))
            ops.append(_projection(name, in_channels, self.size, rewinds=self.reduction == 1))
        return (*ops, _projection("output", wide, self.filters, rewinds=True), *_layer_scale(self))

    def product_madds(self, queries: int, keys: int) -> int:
        """Multiply-adds of the two matrix products for so many pixels of either."""
        return 2 * self.heads * self.size * queries * keys


Row = Conv | Separable | InvertedResidual | FusedInvertedResidual | UniversalInverted | MultiQueryAttention


def _depthwise(row: Separable | InvertedResidual | UniversalInverted | MultiQueryAttention, channels: int) -> Op:
    return Op(
        name="depthwise",
        in_channels=channels,
        filters=channels,
        kernel=row.kernel,
        stride=row.stride,
        dilation=row.dilation,
        depthwise=True,
        activation="linear" if isinstance(row, MultiQueryAttention) else row.activation,
    )


def _dense(name: str, in_channels: int, units: int, activation: str = "linear") -> Op:
    op = Op(name=name, in_channels=in_channels, filters=units, norm=False, bias=True, pooled=True)
    return replace(op, activation=activation)


def _projection(name: str, in_channels: int, filters: int, *, rewinds: bool) -> Op:
    return Op(name=f"{name}/project", in_channels=in_channels, filters=filters, norm=False, rewinds=rewinds)


def _antialias(row: FusedInvertedResidual | UniversalInverted, op: Op) -> tuple[Op, ...]:
    """The convolution, if it has a kernel, and what takes its stride."""
    if not op.kernel or op.stride == 1 or not row.antialias:
        return (op,) if op.kernel else ()
    pool = Op(name="pool", in_channels=op.filters, filters=op.filters, kernel=0, norm=False)
    return replace(op, stride=1), replace(pool, stride=2, antialias=row.antialias)


def _layer_scale(row: UniversalInverted | MultiQueryAttention) -> tuple[Op, ...]:
    if not row.layer_scale:
        return ()
    op = Op(name="layer_scale", in_channels=row.filters, filters=row.filters, kernel=0, norm=False)
    return (replace(op, scale=row.layer_scale),)


def _check_row(row: Row, *kernels: int, least: int = 1) -> None:
    if not isinstance(row, MultiQueryAttention):
        check_choice("activation", row.activation, ACTIVATIONS)
    if isinstance(row, FusedInvertedResidual | UniversalInverted):
        check_choice("antialias", row.antialias, ANTIALIASES)
    odd = all(k % 2 == 1 or k == least == 0 for k in kernels or (row.kernel,))
    if row.filters < 1 or not odd or row.kernel < least or row.stride not in (1, 2) or row.dilation < 1:
        raise ValueError(f"impossible row {row}: filters >= 1, odd kernel, stride 1 or 2, dilation >= 1 are valid")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A whole network: stem, blocks, head (before the pooling), hidden layer (behind it), classifier."""

    name: str
    stem: Conv
    blocks: tuple[Row, ...]
    head: Conv | None
    hidden: int = 0  # units of the layer between pooling and classifier; 0: none
    hidden_activation: str = "linear"
    hidden_norm: bool = False  # V4: batch norm behind the hidden layer instead of its bias
    num_classes: int = 1000  # 0: no classifier
    in_channels: int = 3
    padding: str = "same"
    bn_epsilon: float = 1e-3
    bn_decay: float = 0.99  # share of the running statistics kept at each step
    shortcut: str = "bottleneck"
    sum_activation: str = "linear"  # behind the sum of a residual between bottlenecks
    dropout: float = 0.2
    drop_path: float = 0.0  # drop rate of the last block's residual branch; earlier ones have less, linearly
    drop_path_flat: bool = False  # the same rate for every block
    init: str = "he"
    slim_stddev: float = 0.09  # of init="slim"
    hidden_is_conv: bool = False  # how the framework of the convention stores the layer: a 1x1 convolution ...
    classifier_is_conv: bool = False  # ... or a dense one; the numbers are the same

    def __post_init__(self):
        check_choice("padding", self.padding, PADDINGS)
        check_choice("shortcut", self.shortcut, SHORTCUTS)
        check_choice("sum_activation", self.sum_activation, ACTIVATIONS)
        check_choice("init", self.init, INITS)
        for key, value in (("dropout", self.dropout), ("drop_path", self.drop_path)):
            check_share(key, value)
        check_share("bn_decay", self.bn_decay)
        if not self.bn_epsilon > 0:
            raise ValueError(f"bn_epsilon is {self.bn_epsilon}; valid: above 0")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; valid: 0 (no classifier) or more")

    def rows(self) -> Iterator[tuple[str, Row, int]]:
        """(name, row, input channels) from the stem to the head; the names are the modules' paths."""
        channels = self.in_channels
        head = [("head", self.head)] if self.head else []
        blocks = [(f"block_{i:02d}", row) for i, row in enumerate(self.blocks)]
        for name, row in [("stem", self.stem), *blocks, *head]:
            yield name, row, channels
            channels = row.filters

    def tail_ops(self) -> tuple[Op, ...]:
        """The layers behind the pooling: hidden and classifier, those there are."""
        channels = (self.head or self.blocks[-1]).filters
        ops = []
        if self.hidden:
            hidden = _dense("hidden", channels, self.hidden, self.hidden_activation)
            ops.append(replace(hidden, norm=self.hidden_norm, bias=not self.hidden_norm))
            channels = self.hidden
        if self.num_classes:
            ops.append(_dense("classifier", channels, self.num_classes))
        return tuple(ops)

    def taps(self) -> dict[str, str]:
        """Feature name -> row: `stem`, the last row of each stride, and `final`, the pooling's input."""
        taps, stride, last = {"stem": "stem"}, 1, "stem"
        for name, row, _ in self.rows():
            if name != "head":
                stride *= row.stride
                taps[f"stride{stride}"] = name
            last = name
        return {**taps, "final": last}


def map_rows(spec: Spec, change: Callable[[Row], Row]) -> Spec:
    """The spec with `change` applied to stem, blocks and head."""
    head = change(spec.head) if spec.head else None
    blocks = tuple(change(row) for row in spec.blocks)
    return replace(spec, stem=change(spec.stem), blocks=blocks, head=head)  # pyright: ignore[reportArgumentType]


def _map_inverted(spec: Spec, option: str, change: Callable[[InvertedResidual], InvertedResidual]) -> Spec:
    if not any(isinstance(row, InvertedResidual) for row in spec.blocks):
        raise ValueError(f"{option} does not apply to {spec.name}: it has no inverted residual blocks")
    return map_rows(spec, lambda row: change(row) if isinstance(row, InvertedResidual) else row)


def with_activation(spec: Spec, activation: str) -> Spec:
    """One activation wherever the table has one; linear projections, squeeze-excite and attention stay."""

    def change(row: Row) -> Row:
        return row if isinstance(row, MultiQueryAttention) else replace(row, activation=activation)

    spec = map_rows(spec, change)
    return replace(spec, hidden_activation=activation) if spec.hidden else spec


def with_hard_swish_from(spec: Spec, first: int) -> Spec:
    """Hard-swish in the blocks from `first` (0) on, ReLU in those before it; stem and last layers stay.

    Of V3-Large, 6 is the table (h-swish from 80 channels on), 0 and 10 are "h-swish @16" and "@112" of 1905.02244
    Table 5.
    """
    if first not in range(len(spec.blocks) + 1):
        raise ValueError(f"hard_swish_from is {first}; {spec.name} has {len(spec.blocks)} blocks: 0 to that is valid")
    late = with_activation(spec, "hard_swish").blocks[first:]
    return replace(spec, blocks=with_activation(spec, "relu").blocks[:first] + late)


def with_projection_activation(spec: Spec, activation: str) -> Spec:
    """`linear` is V2's linear bottleneck, `relu6` the ablation of 1801.04381 Fig. 6a."""
    change = lambda row: replace(row, projection_activation=activation)  # noqa: E731
    return _map_inverted(spec, "projection_activation", change)


def with_shortcut(spec: Spec, shortcut: str) -> Spec:
    """Where residuals go: between bottlenecks, between expansions, nowhere (1801.04381 Fig. 6b).

    `expansion` adds a block's activated depthwise output to the next block's activated expansion where their
    channels agree: ten times in V2 at width 1, as often as the bottlenecks'.
    """
    return replace(_map_inverted(spec, "shortcut", lambda row: row), shortcut=shortcut)


def with_sum_activation(spec: Spec, activation: str) -> Spec:
    """An activation behind the sum of each residual; beside relu6 projections it leaves no map linear."""
    return replace(_map_inverted(spec, "sum_activation", lambda row: row), sum_activation=activation)


def with_expansion(spec: Spec, factor: float) -> Spec:
    """One expansion factor for every row that expands; factor 1 leaves their expansion convolution out."""
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
    """Reduced over expanded channels where the table has squeeze-excite, else everywhere; 0 removes it."""
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
    """Every block in one of the four forms of 1801.04381 Fig. 2, with the channels and strides of the table.

    `regular` is one full convolution: of V1, 1704.04861 Table 4. `separable` is V1's depthwise and pointwise.
    `linear_bottleneck` is V2 without its residuals: 2c and 2d are the same layers when stacked. `inverted_residual`
    is V2.
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
    """Without the longest run of equal blocks: of V1 the five of 14x14x512 (1704.04861 Table 5)."""
    runs = [list(run) for _, run in groupby(range(len(spec.blocks)), key=lambda i: spec.blocks[i])]
    longest = max(runs, key=len)
    if shallow and len(longest) == 1:
        raise ValueError(f"shallow does not apply to {spec.name}: it has no two equal blocks in a row")
    kept = (row for i, row in enumerate(spec.blocks) if not (shallow and i in longest))
    return replace(spec, blocks=tuple(kept))


def with_head_width(spec: Spec, width: int) -> Spec:
    """Channels of the last layer before the classifier: V3's hidden layer, V2's last 1x1; V1 has neither."""
    if width < 1:
        raise ValueError(f"head_width is {width}; valid: 1 or more")
    if spec.hidden:
        return replace(spec, hidden=width)
    if spec.head is None:
        raise ValueError(f"head_width does not apply to {spec.name}: its classifier sees the last block")
    return replace(spec, head=replace(spec.head, filters=width))


def with_stride_one(spec: Spec, which: tuple[int, ...]) -> Spec:
    """Stride 1 in the given stride-2 rows, counted from the stem (0): small images keep useful maps.

    (0,) is what the CIFAR versions of V1 do: 32 px arrive at the pooling as 2x2 instead of 1x1.
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
    """Dilation instead of strides beyond `output_stride`, same weights (1801.04381 sec. 6.3; slim's rule).

    The row whose stride is taken away keeps the dilation so far; those behind it have it doubled.
    """
    check_choice("output_stride", output_stride, (8, 16, 32))
    stride, dilation, blocks = spec.stem.stride, 1, []
    for row in spec.blocks:
        if row.stride == 2 and stride == output_stride:
            blocks.append(_without_stride(row, dilation=dilation))
            dilation *= 2
        else:
            blocks.append(replace(row, dilation=dilation))
            stride *= row.stride
    return replace(spec, blocks=tuple(blocks))


def _with_field(field: str) -> Callable[..., Spec]:
    return lambda spec, value: replace(spec, **{field: value})


# What `create_model`, the config's model section and the command line can change, in the order of
# application: squeeze-excite is sized after the expansion, blocks take other forms when their channels are known, and
# dilation follows the strides.
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
    "init": _with_field("init"),
    "dropout": _with_field("dropout"),
    "drop_path": _with_field("drop_path"),
    "drop_path_flat": _with_field("drop_path_flat"),
    "bn_decay": _with_field("bn_decay"),
    "bn_epsilon": _with_field("bn_epsilon"),
}


def apply_options(spec: Spec, **options: object) -> Spec:
    """The spec with every option that is not None applied; ValueError for an unknown or impossible one."""
    for key in options:
        check_choice("model option", key, tuple(OPTIONS))
    for key, change in OPTIONS.items():
        if options.get(key) is not None:
            spec = change(spec, options[key])
    return spec


def to_json(spec: Spec) -> dict:
    """The spec as plain data: what travels with weights and checkpoints."""
    rows = [{"name": name, "kind": type(row).__name__, **dataclasses.asdict(row)} for name, row, _ in spec.rows()]
    fields = dataclasses.asdict(spec)
    return {**{k: v for k, v in fields.items() if k not in ("stem", "blocks", "head")}, "rows": rows}


def from_json(data: dict) -> Spec:
    """The spec that `to_json` wrote; ValueError, naming the key, for anything else."""
    kinds = {kind.__name__: kind for kind in get_args(Row)}
    rows: dict[str, Row] = {}
    if not isinstance(data.get("rows"), list):
        raise ValueError("it has no list of rows")
    for i, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f"row {i} has no name")
        check_choice(f"kind of row {row['name']}", row.get("kind"), tuple(kinds))
        rows[row["name"]] = _read_fields(kinds[row["kind"]], row, f"row {row['name']}")
    if not isinstance(rows.get("stem"), Conv):
        raise ValueError("its rows have no stem")
    head = rows.pop("head", None)
    stem, *blocks = rows.values()
    spec = _read_fields(Spec, {**data, "stem": stem, "blocks": tuple(blocks), "head": head}, "spec")
    if [name for name, _, _ in spec.rows()][: len(rows)] != list(rows):
        raise ValueError(f"rows are called {', '.join(rows)}; valid: stem, block_00, block_01, ...")
    return spec


# Fields that older files lack, with what those networks have.
_YOUNG_FIELDS = {"sum_activation": "linear"}


def _read_fields(cls: type, data: dict, where: str):
    """`cls` of the entries of `data`, each of the field's type; nested dataclasses from dicts."""
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        valid = get_args(hints[field.name]) or (hints[field.name],)
        value = data.get(field.name, _YOUNG_FIELDS.get(field.name))
        nested = [kind for kind in valid if dataclasses.is_dataclass(kind)]
        if isinstance(value, dict) and len(nested) == 1:
            value = _read_fields(nested[0], value, f"{where}.{field.name}")  # pyright: ignore[reportArgumentType]
        if type(value) is int and float in valid:
            value = float(value)
        if type(value) not in valid and get_origin(hints[field.name]) is not tuple:
            names = " or ".join(kind.__name__ for kind in valid)
            raise ValueError(f"{where}.{field.name} is {value!r}; valid: {names}")
        values[field.name] = value
    return cls(**values)
