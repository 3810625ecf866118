"""Ops: the layers of a network as they run, with every integer resolved. No JAX here.

A row of a table (`spec.py`) lists its ops. Modules, cost, initial values and weight importers walk the same ops, and
each dispatches on the op's type. A new kind of layer is a class here, a case in `blocks.py` and, unless it costs what
a convolution costs, a case in `cost.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

_STATISTICS = ("mean", "var")  # leaves that are measured, not trained


def pads(size: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """Return the number of zeros (before, after) along one axis of `size` pixels.

    `same` is TensorFlow's rule, `symmetric` is PyTorch's (k - 1) // 2, `end` is the (0, 1) of Keras' MobileNet V1.
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
    """A layer from `in_channels` to `filters` channels; the base of all kinds."""

    pooled: ClassVar[bool] = False  # true: it runs on one vector for each image, the spatial mean

    name: str  # path inside its row: "expand", "se/reduce"; empty: the row's own path
    in_channels: int
    filters: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each variable by its path inside the op."""
        return {}

    def parts(self) -> "tuple[Op, ...]":
        """Return the ops that hold the variables: the op itself, or the ops it is composed of."""
        return (self,)

    @property
    def params(self) -> int:
        """The number of trainable elements."""
        return sum(math.prod(shape) for leaf, shape in self.shapes().items() if not leaf.endswith(_STATISTICS))

    @property
    def statistics(self) -> int:
        """The number of running means and variances."""
        return sum(math.prod(shape) for leaf, shape in self.shapes().items() if leaf.endswith(_STATISTICS))

    @property
    def kernel_elements(self) -> int:
        """The number of elements of the kernel, which is the number of multiply-adds for each output pixel."""
        return sum(math.prod(shape) for leaf, shape in self.shapes().items() if leaf.endswith("kernel"))

    def output_size(self, height: int, width: int, padding: str) -> tuple[int, int]:
        """Return the height and width of the output; raise ValueError if nothing would be left."""
        return height, width


def _norm_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("scale", "bias", *_STATISTICS), (channels,))


@dataclass(frozen=True, kw_only=True)
class ConvOp(Op):
    """A convolution without bias, then batch norm if it has one, then the activation."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1  # channel groups
    norm: bool = True
    activation: str = "linear"
    distribution: str = "he"  # of the initial kernel: he | glorot, see `init.py`

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """[k, k, input channels of a group, filters]."""
        return self.kernel, self.kernel, self.in_channels // self.groups, self.filters

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The kernel, and the variables of the norm."""
        norm = _norm_shapes(self.filters) if self.norm else {}
        return {"conv/kernel": self.kernel_shape, **{f"norm/{leaf}": shape for leaf, shape in norm.items()}}

    def pads(self, height: int, width: int, padding: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the zeros ((top, bottom), (left, right)) around a map of `height` x `width`."""
        rule = "same" if padding == "keras_v1" else padding
        return tuple(pads(n, self.kernel, self.stride, self.dilation, rule) for n in (height, width))  # pyright: ignore[reportReturnType]

    def output_size(self, height: int, width: int, padding: str) -> tuple[int, int]:
        """Return the height and width of the output; raise ValueError if nothing would be left."""
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


class DepthwiseOp(ConvOp):
    """A convolution with one group for each channel: `groups`, `in_channels` and `filters` are equal."""

    def pads(self, height: int, width: int, padding: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the zeros around a map; Keras' V1 pads (0, 1) at stride 2, whatever the size."""
        rule = "end" if padding == "keras_v1" and self.stride == 2 else padding
        return super().pads(height, width, rule)


class PooledConvOp(ConvOp):
    """A 1x1 convolution and its norm on the pooled vector: V4's hidden layer."""

    pooled = True


@dataclass(frozen=True, kw_only=True)
class DenseOp(Op):
    """A matrix product and a bias on a vector, then the activation."""

    pooled = True

    activation: str = "linear"
    distribution: str = "he"  # of the initial kernel: he | small, see `init.py`

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """[input channels, filters]."""
        return self.in_channels, self.filters

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The kernel and the bias."""
        return {"kernel": self.kernel_shape, "bias": (self.filters,)}


@dataclass(frozen=True, kw_only=True)
class NormOp(Op):
    """Batch norm alone."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The variables of the norm."""
        return _norm_shapes(self.filters)


@dataclass(frozen=True, kw_only=True)
class AntialiasOp(Op):
    """A fixed filter of stride 2 in the place of a convolution's stride."""

    antialias: str  # avg | blur

    def output_size(self, height: int, width: int, padding: str) -> tuple[int, int]:
        """`avg` takes pairs of pixels; `blur` takes every second pixel with its neighbours, padded."""
        more = 1 if self.antialias == "blur" else 0
        return (height + more) // 2, (width + more) // 2


@dataclass(frozen=True, kw_only=True)
class LayerScaleOp(Op):
    """A learned factor for each channel."""

    initial: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The factors."""
        return {"gamma": (self.filters,)}


@dataclass(frozen=True, kw_only=True)
class SqueezeExciteOp(Op):
    """Channel gates from the spatial mean: reduce, ReLU, expand, gate."""

    reduced: int
    gate: str

    @property
    def reduce(self) -> DenseOp:
        """The first dense layer."""
        return DenseOp(name=f"{self.name}/reduce", in_channels=self.in_channels, filters=self.reduced)

    @property
    def expand(self) -> DenseOp:
        """The second dense layer."""
        return DenseOp(name=f"{self.name}/expand", in_channels=self.reduced, filters=self.filters)

    def parts(self) -> tuple[Op, ...]:
        """The two dense layers."""
        return self.reduce, self.expand


@dataclass(frozen=True, kw_only=True)
class AttentionOp(Op):
    """Query, key and value of one map, and the two matrix products of attention between them."""

    heads: int
    query: tuple[ConvOp, ...]
    key: tuple[ConvOp, ...]
    value: tuple[ConvOp, ...]

    def parts(self) -> tuple[Op, ...]:
        """The convolutions of query, key and value."""
        return *self.query, *self.key, *self.value

    def product_madds(self, queries: int, keys: int) -> int:
        """Return the multiply-adds of the two matrix products for so many pixels of query and key."""
        return 2 * self.filters * queries * keys
