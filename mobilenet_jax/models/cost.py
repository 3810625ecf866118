"""What a network costs, by arithmetic on its spec: parameters, multiply-adds, activation memory. No JAX."""

from dataclasses import dataclass, replace

from mobilenet_jax.models.spec import MultiQueryAttention, Op, Residual, Spec


@dataclass(frozen=True)
class OpCost:
    """One convolution or dense layer, on one image."""

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
        """Multiply-adds: output positions times kernel area times input channels a group."""
        return self.height * self.width * self.op.kernel_elements

    @property
    def outputs(self) -> int:
        """Elements written."""
        return self.height * self.width * self.op.filters


@dataclass(frozen=True)
class Cost:
    """Totals of a network on one image, in the columns of the published counts."""

    ops: tuple[OpCost, ...]
    channels: tuple[int, ...]  # output channels of every convolution in running order, the framework's dense left out
    inference_elements: int  # largest set of activations alive at once in inference
    training_elements: int  # activations kept for the backward pass
    attention_madds: int = 0  # multiply-adds of attention's two matrix products; beside `madds`, not in it

    @property
    def params(self) -> int:
        """Trainable parameters."""
        return sum(c.op.params for c in self.ops)

    @property
    def batch_stats(self) -> int:
        """Running means and variances."""
        return sum(2 * c.op.filters for c in self.ops if c.op.norm)

    @property
    def madds(self) -> int:
        """Multiply-adds of convolutions and dense layers; not of norms, biases, pooling or gates."""
        return sum(c.madds for c in self.ops)

    @property
    def standard(self) -> tuple[int, int]:
        """(params, multiply-adds) with each depthwise convolution and the pointwise behind it made one.

        The arithmetic of 1704.04861 sec. 3.1: k*k*M*H*W + M*N*H*W against k*k*M*N*H*W. Of the two batch norms
        one is left.
        """
        params, madds, depthwise = self.params, self.madds, None
        for cost in self.ops:
            if cost.op.depthwise:
                depthwise = cost
            elif depthwise and cost.op.kernel and not cost.op.pooled:
                full = replace(depthwise.op, depthwise=False, filters=cost.op.filters)
                full_cost = OpCost(cost.row, full, depthwise.height, depthwise.width)
                params += full.params - depthwise.op.params - cost.op.params
                madds += full_cost.madds - depthwise.madds - cost.madds
                depthwise = None
        return params, madds


def compute_cost(spec: Spec, image_size: int | tuple[int, int]) -> Cost:
    """Walk the spec over an image of `image_size` pixels (a side, or height and width).

    Raises ValueError where the image is too small for the strides.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    ops, memory, attention_madds = [], _Memory(elements=height * width * spec.in_channels), 0
    for name, row, channels in spec.rows():
        attention, size = row if isinstance(row, MultiQueryAttention) else None, (height, width)
        residual = isinstance(row, Residual) and row.has_residual(channels)
        memory.enter_row(residual=residual, gathers=attention is not None)
        for op in row.ops(channels):
            keys = height * width
            height, width = size if op.rewinds else (height, width)
            if attention and op.name == "output/project":
                queries = height * width
                attention_madds += attention.product_madds(queries, keys)
                memory.attend(attention.heads * queries * keys, queries * op.in_channels)
            if not op.pooled:
                height, width = op.output_size(height, width, spec.padding)
            cost = OpCost(name, op, *((1, 1) if op.pooled else (height, width)))
            memory.run(cost)
            ops.append(cost)
    memory.enter_row(residual=False, gathers=False)
    for op in spec.tail_ops():
        cost = OpCost(op.name, replace(op, name=""), 1, 1)
        memory.run(cost)
        ops.append(cost)
    dense = {"hidden": not spec.hidden_is_conv, "classifier": not spec.classifier_is_conv}
    channels = tuple(c.op.filters for c in ops if c.op.kernel and not dense.get(c.row, False))
    return Cost(tuple(ops), channels, memory.peak, memory.kept, attention_madds)


class _Memory:
    """Activations alive while ops run in order, and those that reverse-mode differentiation keeps.

    Alive at an op: its input, its output, and the row's input where a residual will need it; norm, activation,
    layer scale and the residual's sum work in place. Attention lets nothing go between its norm and its products.
    Kept: the input image, both sides of every batch norm, the output of everything else, the gated map behind
    squeeze-excite, and attention's probabilities.
    """

    def __init__(self, elements: int):
        self.current = elements  # the last map; in attention, with those before it
        self.held = 0  # the row's input, waiting for the residual
        self.fresh = True  # no op of the row has run: its input is the last map
        self.gathers = False  # in attention, before the products
        self.peak = self.kept = elements

    def enter_row(self, *, residual: bool, gathers: bool) -> None:
        self.held, self.fresh, self.gathers = self.current if residual else 0, True, gathers

    def run(self, cost: OpCost) -> None:
        if cost.op.scale:
            return
        before = 0 if self.fresh else self.held
        self.peak = max(self.peak, before + self.current + cost.outputs)
        self.kept += cost.outputs * (2 if cost.op.norm else 1)
        if cost.op.name == "se/expand":
            self.kept += self.current
        elif not cost.op.name.startswith("se/"):
            self.current = cost.outputs + (self.current if self.gathers and not self.fresh else 0)
        self.fresh = False

    def attend(self, scores: int, attended: int) -> None:
        self.peak = max(self.peak, self.held + self.current + scores + attended)
        self.kept += scores + attended
        self.current, self.gathers = attended, False
