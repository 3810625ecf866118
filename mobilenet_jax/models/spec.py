"""Architectures as data: the rows of the tables, and the network that they form. No JAX here.

A `Spec` is a network with every integer resolved. Its rows list their ops (`ops.py`), and everything else walks these:
`network.py` builds modules, `cost.py` counts, `init.py` draws values, the weight importers name tensors. So the network
that is counted is the network that runs.

To add a variant, write its table beside `v2.py` and register it in `zoo.py`. To add an option that changes any network,
write a function in `options.py`. To change a block, change its row here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from mobilenet_jax.models.ops import (
    AntialiasOp,
    AttentionOp,
    ConvOp,
    DenseOp,
    DepthwiseOp,
    LayerScaleOp,
    NormOp,
    Op,
    PooledConvOp,
    SqueezeExciteOp,
)

# The valid values, named here alone: options, configs and error messages read them.
ACTIVATIONS = ("linear", "relu", "relu6", "hard_swish", "gelu")
PADDINGS = ("same", "symmetric", "keras_v1")
SHORTCUTS = ("bottleneck", "expansion", "none")
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


@dataclass(frozen=True, kw_only=True)
class _Straight:
    """The fields that the rows without a residual share."""

    filters: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    activation: str = "relu6"

    def __post_init__(self):
        _check_row(self)  # pyright: ignore[reportArgumentType]


class Conv(_Straight):
    """A full convolution, batch norm, activation: the stem and the last 1x1."""

    def ops(self, in_channels: int) -> tuple[ConvOp, ...]:
        """Return the convolution; its name is empty because its path is the row's own."""
        return (_spatial(self, ConvOp, "", in_channels, self.filters),)


class Separable(_Straight):
    """V1's block: depthwise, then pointwise, each with batch norm and activation (1704.04861, Fig. 3)."""

    def ops(self, in_channels: int) -> tuple[ConvOp, ...]:
        """Return depthwise and pointwise."""
        return _depthwise(self, in_channels), _pointwise("pointwise", in_channels, self.filters, self.activation)


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
        """Return the number of channels that `expanded` ones are reduced to."""
        if self.rounding == "div8":
            return make_divisible(expanded * self.ratio)
        return max(1, int(expanded * self.ratio))


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The fields that all rows with a residual share."""

    filters: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    skip: bool = True  # may have a residual, where stride and channels allow one

    def has_residual(self, in_channels: int) -> bool:
        """Return true if the table adds input and output, and their shapes allow it."""
        return self.skip and self.stride == 1 and in_channels == self.filters

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Return the layers of the row's branch in running order."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class InvertedResidual(Residual):
    """The block of V2 and V3: expand, depthwise, gate, project (1801.04381 Table 1, 1905.02244 Fig. 4)."""

    expanded: int
    expands: bool = True  # false: no expansion convolution, `expanded` is the input's width
    activation: str = "relu6"
    projection_activation: str = "linear"
    se: SqueezeExcite | None = None

    def __post_init__(self):
        _check_row(self)
        check_choice("projection_activation", self.projection_activation, ACTIVATIONS)

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Return expansion, depthwise, squeeze-excite and projection: those the row has, in order."""
        ops: list[Op] = []
        if self.expands:
            ops.append(_pointwise("expand", in_channels, self.expanded, self.activation))
        ops.append(_depthwise(self, self.expanded))
        if self.se:
            channels = {"in_channels": self.expanded, "filters": self.expanded}
            reduced = self.se.channels(self.expanded)
            ops.append(SqueezeExciteOp(name="se", **channels, reduced=reduced, gate=self.se.gate))
        return *ops, _pointwise("project", self.expanded, self.filters, self.projection_activation)


@dataclass(frozen=True, kw_only=True)
class FusedInvertedResidual(Residual):
    """Expansion and depthwise in one full convolution, then the projection (EfficientNet-EdgeTPU, 2003.02838).

    Accelerators run it faster than the two convolutions it replaces where channels are few.
    """

    expanded: int
    group_size: int = 0  # expanded channels in each group of the convolution; 0: one group
    activation: str = "relu"
    antialias: str = ""  # avg | blur: a fixed filter takes the stride, the convolution has none

    def __post_init__(self):
        _check_row(self)
        if self.group_size < 0 or (self.group_size and self.expanded % self.group_size):
            raise ValueError(f"group_size is {self.group_size}; valid: a divisor of the {self.expanded} channels")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Return fused expansion and projection; raise ValueError if the groups do not divide the input."""
        groups = self.expanded // self.group_size if self.group_size else 1
        if in_channels % groups:
            raise ValueError(
                f"the {in_channels} input channels of a fused bottleneck do not divide into its {groups} groups"
            )
        expand = replace(_spatial(self, ConvOp, "expand", in_channels, self.expanded), groups=groups)
        return *_antialias(self, expand), _pointwise("project", self.expanded, self.filters)


@dataclass(frozen=True, kw_only=True)
class UniversalInverted(Residual):
    """V4's block: an inverted bottleneck with two optional depthwise convolutions (2404.10518).

    Both: extra depthwise. Only the middle one, `kernel`: inverted bottleneck. Only the first, `start`: ConvNext-like.
    Neither: feed-forward.
    """

    expanded: int
    start: int = 0  # kernel of the depthwise before the expansion; 0: none. It has no activation
    kernel: int = 0  # kernel of the depthwise behind the expansion; 0: none. If it is there, it has the stride
    activation: str = "relu"
    layer_scale: float = 0.0  # initial value of learned factors on the branch (2103.17239 sec. 2); 0: no factors
    antialias: str = ""  # avg | blur: a fixed filter takes the stride, the convolution has none

    def __post_init__(self):
        _check_row(self, self.start, self.kernel, least=0)
        if self.stride == 2 and not (self.start or self.kernel):
            raise ValueError(f"impossible row {self}: without a depthwise convolution only stride 1 is valid")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Return first depthwise, expansion, middle depthwise, projection, layer scale: those the row has."""
        ops: list[Op] = []
        if self.start:
            start = replace(_depthwise(self, in_channels, "start/depthwise"), kernel=self.start, activation="linear")
            ops += _antialias(self, replace(start, stride=1) if self.kernel else start)
        ops.append(_pointwise("expand", in_channels, self.expanded, self.activation))
        if self.kernel:
            ops += _antialias(self, _depthwise(self, self.expanded))
        return *ops, _pointwise("project", self.expanded, self.filters), *_layer_scale(self)


@dataclass(frozen=True, kw_only=True)
class MultiQueryAttention(Residual):
    """V4's mobile attention: many query heads, one key and value, on a smaller map (2404.10518)."""

    heads: int
    size: int  # channels of each head's queries, of the key and of the value
    reduction: int = 1  # stride of the depthwise convolutions before key and value; 1: no such convolutions
    layer_scale: float = 0.0

    def __post_init__(self):
        _check_row(self)
        if self.heads < 1 or self.size < 1 or self.reduction not in (1, 2) or self.stride != 1:
            raise ValueError(f"impossible row {self}: heads and size >= 1, reduction 1 or 2, stride 1 are valid")

    def ops(self, in_channels: int) -> tuple[Op, ...]:
        """Return norm, attention, output, layer scale: the last if the row has it."""
        wide = self.heads * self.size
        attention = AttentionOp(
            name="attention",
            in_channels=in_channels,
            filters=wide,
            heads=self.heads,
            query=(_projection("query", in_channels, wide),),
            key=self._reduce("key", in_channels),
            value=self._reduce("value", in_channels),
        )
        return (
            NormOp(name="norm", in_channels=in_channels, filters=in_channels),
            attention,
            _projection("output", wide, self.filters),
            *_layer_scale(self),
        )

    def _reduce(self, name: str, in_channels: int) -> tuple[ConvOp, ...]:
        project = _projection(name, in_channels, self.size)
        if self.reduction == 1:
            return (project,)
        depthwise = _depthwise(self, in_channels, f"{name}/depthwise")
        return replace(depthwise, stride=self.reduction, distribution="glorot"), project


_C = TypeVar("_C", bound=ConvOp)
Row = Conv | Separable | InvertedResidual | FusedInvertedResidual | UniversalInverted | MultiQueryAttention


def _spatial(row: Row, kind: type[_C], name: str, in_channels: int, filters: int) -> _C:
    """Return the convolution that has the row's kernel, stride and dilation."""
    return kind(
        name=name,
        in_channels=in_channels,
        filters=filters,
        kernel=row.kernel,
        stride=row.stride,
        dilation=row.dilation,
        activation="linear" if isinstance(row, MultiQueryAttention) else row.activation,
    )


def _depthwise(row: Row, channels: int, name: str = "depthwise") -> DepthwiseOp:
    return replace(_spatial(row, DepthwiseOp, name, channels, channels), groups=channels)


def _pointwise(name: str, in_channels: int, filters: int, activation: str = "linear") -> ConvOp:
    return ConvOp(name=name, in_channels=in_channels, filters=filters, activation=activation)


def _projection(name: str, in_channels: int, filters: int) -> ConvOp:
    return replace(_pointwise(f"{name}/project", in_channels, filters), norm=False, distribution="glorot")


def _antialias(row: FusedInvertedResidual | UniversalInverted, op: ConvOp) -> tuple[Op, ...]:
    """Return the convolution and, if the row is antialiased, the filter that takes its stride."""
    if op.stride == 1 or not row.antialias:
        return (op,)
    pool = AntialiasOp(name="pool", in_channels=op.filters, filters=op.filters, antialias=row.antialias)
    return replace(op, stride=1), pool


def _layer_scale(row: UniversalInverted | MultiQueryAttention) -> tuple[Op, ...]:
    if not row.layer_scale:
        return ()
    scale = LayerScaleOp(name="layer_scale", in_channels=row.filters, filters=row.filters, initial=row.layer_scale)
    return (scale,)


def _check_row(row: Row, *kernels: int, least: int = 1) -> None:
    if not isinstance(row, MultiQueryAttention):
        check_choice("activation", row.activation, ACTIVATIONS)
    if isinstance(row, FusedInvertedResidual | UniversalInverted):
        check_choice("antialias", row.antialias, ANTIALIASES)
    if isinstance(row, InvertedResidual | FusedInvertedResidual | UniversalInverted) and row.expanded < 1:
        raise ValueError(f"impossible row {row}: expanded >= 1 is valid")
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
    slim_stddev: float = 0.09  # standard deviation of init="slim"
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
        if self.in_channels < 1 or self.hidden < 0:
            raise ValueError(f"in_channels is {self.in_channels}, hidden {self.hidden}; valid: from 1, and from 0")

    def rows(self) -> Iterator[tuple[str, Row, int]]:
        """Yield (name, row, input channels) from the stem to the head; the names are the modules' paths."""
        channels = self.in_channels
        head = [("head", self.head)] if self.head else []
        blocks = [(f"block_{i:02d}", row) for i, row in enumerate(self.blocks)]
        for name, row in [("stem", self.stem), *blocks, *head]:
            yield name, row, channels
            channels = row.filters

    def hidden_op(self) -> PooledConvOp | DenseOp | None:
        """Return the layer between pooling and classifier, if there is one."""
        if not self.hidden:
            return None
        kind = PooledConvOp if self.hidden_norm else DenseOp
        channels = (self.head or self.blocks[-1]).filters
        return kind(name="hidden", in_channels=channels, filters=self.hidden, activation=self.hidden_activation)

    def classifier_op(self) -> DenseOp | None:
        """Return the last layer, if there is one."""
        if not self.num_classes:
            return None
        channels = self.hidden or (self.head or self.blocks[-1]).filters
        return DenseOp(name="classifier", in_channels=channels, filters=self.num_classes, distribution="small")

    def tail_ops(self) -> tuple[PooledConvOp | DenseOp, ...]:
        """Return the layers behind the pooling: hidden layer and classifier, those the network has."""
        return tuple(op for op in (self.hidden_op(), self.classifier_op()) if op)

    def layers(self) -> Iterator[tuple[str, Op]]:
        """Yield (path, op) of every layer with variables, in running order: ("block_03/se/reduce", DenseOp(...))."""
        for name, row, channels in self.rows():
            for op in row.ops(channels):
                for part in op.parts():
                    yield f"{name}/{part.name}".removesuffix("/"), part
        for op in self.tail_ops():
            yield op.name, op

    def taps(self) -> dict[str, str]:
        """Return feature name -> row: `stem`, the last row of each stride, and `final`, the pooling's input."""
        taps, stride, last = {"stem": "stem"}, 1, "stem"
        for name, row, _ in self.rows():
            if name != "head":
                stride *= row.stride
                taps[f"stride{stride}"] = name
            last = name
        return {**taps, "final": last}
