"""The cost of a network, by arithmetic on its spec: parameters, multiply-adds, activation memory. No JAX here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mobilenet_jax.models.ops import AttentionOp, ConvOp, DenseOp, DepthwiseOp, LayerScaleOp, Op, SqueezeExciteOp
from mobilenet_jax.models.spec import Residual, Spec


@dataclass(frozen=True)
class OpCost:
    """The cost of one layer on one image."""

    row: str  # "stem", "block_03", ..., "hidden", "classifier"
    op: Op
    height: int  # of the output
    width: int

    @property
    def path(self) -> str:
        """The module's path in the variables."""
        return f"{self.row}/{self.op.name}" if self.op.name else self.row

    @property
    def madds(self) -> int:
        """Multiply-adds: output positions times kernel area times input channels of a group."""
        return self.height * self.width * self.op.kernel_elements

    @property
    def outputs(self) -> int:
        """The number of elements written."""
        return self.height * self.width * self.op.filters


@dataclass(frozen=True)
class Cost:
    """Totals of a network on one image, in the columns of the published counts."""

    ops: tuple[OpCost, ...]
    channels: tuple[int, ...]  # output channels of every layer that the framework stores as a convolution, in order
    inference_elements: int  # largest set of activations alive at once in inference
    training_elements: int  # activations kept for the backward pass
    attention_madds: int = 0  # multiply-adds of attention's two matrix products; `madds` leaves them out

    @property
    def params(self) -> int:
        """The number of trainable parameters."""
        return sum(c.op.params for c in self.ops)

    @property
    def batch_stats(self) -> int:
        """The number of running means and variances."""
        return sum(c.op.statistics for c in self.ops)

    @property
    def madds(self) -> int:
        """Multiply-adds of convolutions and dense layers; not of norms, biases, pooling or gates."""
        return sum(c.madds for c in self.ops)

    @property
    def standard(self) -> tuple[int, int]:
        """(params, multiply-adds) with each depthwise convolution and the pointwise behind it made one.

        The arithmetic of 1704.04861 sec. 3.1: k*k*M*H*W + M*N*H*W against k*k*M*N*H*W. One of the two batch norms
        is left.
        """
        params, madds, depthwise = self.params, self.madds, None
        for cost in self.ops:
            if isinstance(cost.op, DepthwiseOp):
                depthwise = cost
            elif depthwise and isinstance(cost.op, ConvOp) and not cost.op.pooled:
                full = replace(depthwise, op=_merge(depthwise.op, cost.op))
                params += full.op.params - depthwise.op.params - cost.op.params
                madds += full.madds - depthwise.madds - cost.madds
                depthwise = None
        return params, madds


def _merge(depthwise: Op, pointwise: Op) -> ConvOp:
    """Return the full convolution that does the work of both."""
    assert isinstance(depthwise, DepthwiseOp)
    channels, filters = depthwise.in_channels, pointwise.filters
    return ConvOp(name=depthwise.name, in_channels=channels, filters=filters, kernel=depthwise.kernel)


def compute_cost(spec: Spec, image_size: int | tuple[int, int]) -> Cost:
    """Walk the spec over an image of `image_size` pixels (a side, or height and width).

    Raises ValueError if the image is too small for the strides.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    walk = _Walk(size, spec)
    for name, row, channels in spec.rows():
        residual = isinstance(row, Residual) and row.has_residual(channels)
        size = walk.run_row(name, row.ops(channels), size, residual=residual)
    for op in spec.tail_ops():
        # The tail's layers are rows of their own, named by the row alone.
        walk.run_row(op.name, (replace(op, name=""),), size, residual=False)
    dense = {"hidden": not spec.hidden_is_conv, "classifier": not spec.classifier_is_conv}
    channels = tuple(
        c.op.filters for c in walk.ops if isinstance(c.op, ConvOp | DenseOp) and not dense.get(c.row, False)
    )
    return Cost(tuple(walk.ops), channels, walk.peak, walk.kept, walk.attention_madds)


class _Walk:
    """Runs ops in order and counts activations: those alive at once, and those that the backward pass keeps.

    Alive at an op: its input, its output, and the row's input if a residual will need it; norm, activation, layer
    scale and the residual's sum work in place. Attention holds its norm's output, query, key and value until its
    products. Kept: the input image, input and output of every batch norm, the output of everything else, the gated
    map behind squeeze-excite, and attention's probabilities.
    """

    def __init__(self, size: tuple[int, int], spec: Spec):
        self.padding = spec.padding
        self.ops: list[OpCost] = []
        self.attention_madds = 0
        self.current = size[0] * size[1] * spec.in_channels  # the last map; in attention, with the maps before it
        self.peak = self.kept = self.current
        self.held = 0  # the row's input, which waits for the residual
        self.fresh = True  # no op of the row has run yet, so its input is the last map
        self.gathers = False  # in attention, before the products

    def run_row(self, row: str, ops: Iterable[Op], size: tuple[int, int], *, residual: bool) -> tuple[int, int]:
        """Run the ops of a row on a map of `size`; return the size of the last map."""
        self.held, self.fresh = self.current if residual else 0, True
        for op in ops:
            size = self._run(row, op, size)
        return size

    def _run(self, row: str, op: Op, size: tuple[int, int]) -> tuple[int, int]:
        if isinstance(op, AttentionOp):
            return self._attend(row, op, size)
        if isinstance(op, SqueezeExciteOp):
            for part in op.parts():
                self._count(OpCost(row, part, 1, 1))
            self.kept += self.current
            return size
        size = (1, 1) if op.pooled else op.output_size(*size, self.padding)
        cost = OpCost(row, op, *size)
        if isinstance(op, LayerScaleOp):
            self.ops.append(cost)
            return size
        self._count(cost)
        self.current = cost.outputs + (self.current if self.gathers else 0)
        self.fresh = False
        return size

    def _count(self, cost: OpCost) -> None:
        self.ops.append(cost)
        self.peak = max(self.peak, (0 if self.fresh else self.held) + self.current + cost.outputs)
        self.kept += cost.outputs * (2 if cost.op.statistics else 1)

    def _attend(self, row: str, op: AttentionOp, size: tuple[int, int]) -> tuple[int, int]:
        self.gathers = True
        queries, keys, _ = (self._run_branch(row, branch, size) for branch in (op.query, op.key, op.value))
        self.gathers = False
        self.attention_madds += op.product_madds(queries, keys)
        scores, attended = op.heads * queries * keys, queries * op.filters
        self.peak = max(self.peak, self.held + self.current + scores + attended)
        self.kept += scores + attended
        self.current = attended
        return size

    def _run_branch(self, row: str, branch: Iterable[Op], size: tuple[int, int]) -> int:
        """Run the ops of a branch; return the number of pixels of its output."""
        for op in branch:
            size = self._run(row, op, size)
        return size[0] * size[1]
