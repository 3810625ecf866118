"""A network as a graph of the operations that other runtimes have: the third walk of a spec. No JAX here.

The modules compute with a spec, `cost.py` counts with it, and `build_graph` lists its operations: every shape and every
padding is a number, activations are fused where runtimes fuse them, and batch norm and layer scale have no operations
because they are in kernels and biases. A graph holds no arrays, so it is hashable and can be a static argument of a
jitted function. `folding.fold_weights` computes the kernels and biases of its layers from a network's variables.

Maps are [batch, height, width, channels]; a node's `shape` leaves the batch out. Names are the paths of the
parameters: the convolution with the kernel `params/block_03/expand/conv/kernel` is called `block_03/expand`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mobilenet_jax.models.ops import (
    AntialiasOp,
    AttentionOp,
    ConvOp,
    DenseOp,
    LayerScaleOp,
    NormOp,
    Op,
    SqueezeExciteOp,
)
from mobilenet_jax.models.spec import InvertedResidual, Residual, Spec

IMAGES = "images"  # the tensor of normalised images
LOGITS = "logits"  # the output of a file, whatever the graph calls it
PIXELS = "pixels"  # the input, uint8 grey levels, of a graph that normalises them itself
FUSED = ("linear", "relu", "relu6")  # activations that every runtime fuses into the operation before

Pads = tuple[tuple[int, int], tuple[int, int]]
_NO_PADS: Pads = ((0, 0), (0, 0))
_BLUR = tuple(tuple(((i * j / 16,),) for j in (1, 2, 1)) for i in (1, 2, 1))  # [3, 3, 1, 1]; `layers._blur`


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the kernel and bias of a layer come from. Paths are those of the variables, without the collection.

    With factor = scale / sqrt(var + epsilon) of the norm, or 1 without a norm:
      kernel = variable * before * factor * gamma * after
      bias = ((variable, or norm's bias - mean * factor) * gamma * after) + shift
    `folding.fold_weights` computes this.
    """

    kernel: str = ""  # path of the variable; empty: `constant`
    constant: Any = 1.0  # a fixed kernel, as nested tuples, broadcast to the kernel's shape
    bias: str = ""  # path of the variable; empty: the norm's shift, or 0
    norm: str = ""  # path of the batch norm's folder; empty: none
    epsilon: float = 0.0  # of the norm
    gamma: str = ""  # path of the factors of layer scale; empty: none
    before: float = 1.0  # factor of the layer's input: 1/6 behind a hard-sigmoid gate
    after: float = 1.0  # factor of the layer's output: 1 / sqrt(size) of attention's queries
    shift: float | tuple[float, ...] = 0.0  # added to the output: 3 of a hard-sigmoid gate


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operation; the base of all kinds."""

    name: str  # of the operation and of its output
    inputs: tuple[str, ...]  # names of other nodes or of the graph's input
    shape: tuple[int, ...]  # of the output: [height, width, channels], behind the pooling [channels]


@dataclass(frozen=True, kw_only=True)
class Layer(Node):
    """A node with a kernel, a bias and a fused activation, one of FUSED."""

    kernel_shape: tuple[int, ...]
    source: Source
    activation: str = "linear"


@dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """A convolution; its kernel is [height, width, input channels of a group, filters]."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1
    pads: Pads = _NO_PADS  # zeros ((top, bottom), (left, right))

    @property
    def depthwise(self) -> bool:
        """True if every channel has its own filter."""
        return self.groups == self.kernel_shape[3] > 1 == self.kernel_shape[2]


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """A matrix product on vectors; its kernel is [input channels, filters]."""


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """The sum of two tensors of one shape, and a fused activation."""

    activation: str = "linear"


@dataclass(frozen=True, kw_only=True)
class Multiply(Node):
    """A map [height, width, channels] times gates [1, 1, channels]."""


@dataclass(frozen=True, kw_only=True)
class Mean(Node):
    """The mean over height and width: [1, 1, channels] before gates, [channels] at the end of the network."""


@dataclass(frozen=True, kw_only=True)
class AveragePairs(Node):
    """The mean of 2x2 pixels with stride 2; an odd row or column at the end is left out."""


@dataclass(frozen=True, kw_only=True)
class Activate(Node):
    """An activation that runtimes do not fuse: hard_swish, gelu (with erf) or sigmoid."""

    function: str


@dataclass(frozen=True, kw_only=True)
class Attend(Node):
    """Multi-query attention of maps (query, key, value): softmax(query key^T) value for each head.

    The query is [height, width, heads * size], with the channels of each head together, and is scaled already. Key and
    value are [h, w, size].
    """

    heads: int


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in running order, from the input to the output, which is the last node's."""

    name: str  # of the spec
    input: str  # IMAGES, normalised float32, or PIXELS, uint8
    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Node]:
        """The nodes by their names."""
        return {node.name: node for node in self.nodes}

    @property
    def output(self) -> str:
        """The name of the output."""
        return self.nodes[-1].name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without the batch."""
        return self.input_shape if name == self.input else self.by_name[name].shape

    def layers(self) -> tuple[Layer, ...]:
        """Return the nodes with kernels, in running order."""
        return tuple(node for node in self.nodes if isinstance(node, Layer))


def build_graph(spec: Spec, image_size: int | tuple[int, int]) -> Graph:
    """Walk the spec over images of `image_size` pixels (a side, or height and width).

    The output is the logits [num_classes], or the vector before the classifier if the network has no classifier.
    Raises ValueError if the image is too small for the strides.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    walk = _Walk(spec, (height, width, spec.in_channels))
    x, wide = IMAGES, None
    for name, row, channels in spec.rows():
        if isinstance(row, Residual):
            x, wide = walk.run_residual(name, row, channels, x, wide)
        else:
            for op in row.ops(channels):
                x = walk.run_op(name, op, x)
    x = walk.add(Mean(name="pool", inputs=(x,), shape=walk.shape(x)[-1:]))
    for op in spec.tail_ops():
        x = walk.run_dense(op, x)
    return Graph(name=spec.name, input=IMAGES, input_shape=walk.input_shape, nodes=tuple(walk.nodes.values()))


def with_normalisation(graph: Graph, mean: tuple[float, ...], std: tuple[float, ...]) -> Graph:
    """Return the graph of uint8 pixels: its first layer, called `images`, computes (pixels - mean) / std.

    The layer is a depthwise convolution of one pixel. Zeros that pad the normalised images stay zeros behind it.
    """
    channels = graph.input_shape[-1]
    first = Conv(
        name=IMAGES,
        inputs=(PIXELS,),
        shape=graph.input_shape,
        kernel_shape=(1, 1, 1, channels),
        groups=channels,
        source=Source(constant=tuple(1 / s for s in std), shift=tuple(-m / s for m, s in zip(mean, std, strict=True))),
    )
    return replace(graph, input=PIXELS, nodes=(first, *graph.nodes))


@dataclass
class _Walk:
    """Collects the nodes of a spec."""

    spec: Spec
    input_shape: tuple[int, int, int]
    nodes: dict[str, Node] = field(default_factory=dict)
    factor: float = 1.0  # by which the next convolution multiplies its input: what a gate's product still lacks

    def shape(self, name: str) -> tuple[int, ...]:
        return self.input_shape if name == IMAGES else self.nodes[name].shape

    def add(self, node: Node, function: str = "linear") -> str:
        """Append a node, with an activation that cannot be fused as a node behind it; return the output's name."""
        self.nodes[node.name] = node
        if function in FUSED:
            return node.name
        name = f"{node.name}/{function}"
        return self.add(Activate(name=name, inputs=(node.name,), shape=node.shape, function=function))

    def add_fused(self, node: Conv | Dense | Add, function: str) -> str:
        """Append a node with its activation, fused if it can be; return the output's name."""
        return self.add(replace(node, activation=function) if function in FUSED else node, function)

    def run_op(self, row: str, op: Op, x: str) -> str:
        """Append an op of a row on the map x; return the output's name."""
        path = f"{row}/{op.name}" if op.name else row
        match op:
            case ConvOp():
                return self._convolve(path, op, x)
            case SqueezeExciteOp():
                return self._gate(row, path, op, x)
            case AntialiasOp():
                return self._antialias(path, op, x)
            case LayerScaleOp():
                last = self.nodes[x]
                assert isinstance(last, Layer)
                assert last.activation == "linear"
                self.nodes[x] = replace(last, source=replace(last.source, gamma=f"{path}/gamma"))
                return x
            case NormOp():
                source = Source(norm=path, epsilon=self.spec.bn_epsilon)
                return self.add(self._filter_channels(path, x, self.shape(x), source, (1, 1)))
            case AttentionOp():
                return self._attend(row, path, op, x)
        raise TypeError(f"{type(op).__name__} is no op of a block")

    def _convolve(self, path: str, op: ConvOp, x: str, *, after: float = 1.0) -> str:
        height, width, _ = self.shape(x)
        norm = f"{path}/norm" if op.norm else ""
        source = Source(
            kernel=f"{path}/conv/kernel",
            norm=norm,
            epsilon=self.spec.bn_epsilon if norm else 0.0,
            before=self.factor,
            after=after,
        )
        self.factor = 1.0
        node = Conv(
            name=path,
            inputs=(x,),
            shape=(*op.output_size(height, width, self.spec.padding), op.filters),
            kernel_shape=op.kernel_shape,
            source=source,
            stride=op.stride,
            dilation=op.dilation,
            groups=op.groups,
            pads=op.pads(height, width, self.spec.padding),
        )
        return self.add_fused(node, op.activation)

    def _filter_channels(
        self, path: str, x: str, shape: tuple[int, ...], source: Source, size: tuple[int, int], **fields: Any
    ) -> Conv:
        """Return a depthwise convolution whose kernel is not a variable."""
        channels = shape[-1]
        return Conv(
            name=path,
            inputs=(x,),
            shape=shape,
            kernel_shape=(*size, 1, channels),
            groups=channels,
            source=source,
            **fields,
        )

    def _antialias(self, path: str, op: AntialiasOp, x: str) -> str:
        height, width, channels = self.shape(x)
        shape = (*op.output_size(height, width, self.spec.padding), channels)
        if op.antialias == "avg":
            return self.add(AveragePairs(name=path, inputs=(x,), shape=shape))
        source, pads = Source(constant=_BLUR), ((1, 1), (1, 1))
        return self.add(self._filter_channels(path, x, shape, source, (3, 3), stride=2, pads=pads))

    def _gate(self, row: str, path: str, op: SqueezeExciteOp, x: str) -> str:
        """Squeeze-excite: two convolutions of the mean, and their product with the map.

        A hard sigmoid is relu6(x + 3) / 6: the 3 is in the bias, and the sixth in the convolution behind the product.
        """
        shape = self.shape(x)
        gates = self.add(Mean(name=f"{path}/mean", inputs=(x,), shape=(1, 1, shape[-1])))
        for part, activation in ((op.reduce, "relu"), (op.expand, op.gate)):
            name = f"{row}/{part.name}"
            source = Source(kernel=f"{name}/kernel", bias=f"{name}/bias")
            if activation == "hard_sigmoid":
                source, activation, self.factor = replace(source, shift=3.0), "relu6", 1 / 6
            node = Conv(
                name=name,
                inputs=(gates,),
                shape=(1, 1, part.filters),
                kernel_shape=(1, 1, *part.kernel_shape),
                source=source,
            )
            gates = self.add_fused(node, activation)
        return self.add(Multiply(name=path, inputs=(x, gates), shape=shape))

    def _attend(self, row: str, path: str, op: AttentionOp, x: str) -> str:
        outputs = []
        for branch, after in ((op.query, (op.filters // op.heads) ** -0.5), (op.key, 1.0), (op.value, 1.0)):
            y = x
            for i, part in enumerate(branch, start=1):
                y = self._convolve(f"{row}/{part.name}", part, y, after=after if i == len(branch) else 1.0)
            outputs.append(y)
        shape = self.shape(outputs[0])
        return self.add(Attend(name=path, inputs=tuple(outputs), shape=shape, heads=op.heads))

    def run_residual(self, name: str, row: Residual, channels: int, x: str, wide: str | None) -> tuple[str, str | None]:
        """Append a row with its residual; return the output's name, and that of the map that the next row may join."""
        entry, joined, is_inverted = x, None, isinstance(row, InvertedResidual)
        for op in row.ops(channels):
            joins = is_inverted and op.name == "depthwise"
            if joins and row.expands and wide and self.shape(wide) == self.shape(x):  # pyright: ignore[reportAttributeAccessIssue]
                x = self.add(Add(name=f"{name}/join", inputs=(x, wide), shape=self.shape(x)))
            x = self.run_op(name, op, x)
            if joins:
                joined = x
        if self.spec.shortcut == "bottleneck" and row.has_residual(channels):
            total = Add(name=f"{name}/add", inputs=(entry, x), shape=self.shape(x))
            x = self.add_fused(total, self.spec.sum_activation)
        return x, joined if self.spec.shortcut == "expansion" else None

    def run_dense(self, op: ConvOp | DenseOp, x: str) -> str:
        """Append a layer behind the pooling; return the output's name."""
        if isinstance(op, ConvOp):
            source = Source(kernel=f"{op.name}/conv/kernel", norm=f"{op.name}/norm", epsilon=self.spec.bn_epsilon)
        else:
            source = Source(kernel=f"{op.name}/kernel", bias=f"{op.name}/bias")
        node = Dense(name=op.name, inputs=(x,), shape=(op.filters,), kernel_shape=op.kernel_shape[-2:], source=source)
        return self.add_fused(node, op.activation)
