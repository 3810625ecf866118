"""The layers of a network with their kernels, and the factors by which batch norm folds into them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from mobilenet_jax.models.spec import Op, Spec


@dataclass(frozen=True)
class Layer:
    """A convolution or dense layer with the batch norm behind it."""

    path: str  # of the module: "block_03/depthwise"
    op: Op
    kernel: Any  # [..., C]
    scale: Any  # [C], batch norm's; None where there is none
    variance: Any  # [C], the running one; None with the scale
    factor: Any  # [C]: scale / sqrt(variance + epsilon), 1 without a norm: what folds into the kernel

    @property
    def kind(self) -> str:
        """depthwise, pointwise, full (a convolution over space and channels) or dense."""
        if self.op.bias:
            return "dense"
        return "depthwise" if self.op.depthwise else "pointwise" if self.op.kernel == 1 else "full"


def list_layers(spec: Spec, variables: dict) -> Iterator[Layer]:
    """The layers with a kernel, from the stem to the classifier; variables are arrays of NumPy or JAX, also traced."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    ops = [("/".join(filter(None, (name, op.name))), op) for name, row, n in spec.rows() for op in row.ops(n)]
    for path, op in [*ops, *((op.name, op) for op in spec.tail_ops())]:
        if not op.kernel:
            continue
        kernel = leaves[f"params/{path}/kernel" if op.bias else f"params/{path}/conv/kernel"]
        scale = variance = None
        factor = np.ones(op.filters, np.float32)
        if op.norm:
            scale, variance = leaves[f"params/{path}/norm/scale"], leaves[f"batch_stats/{path}/norm/var"]
            factor = scale * (variance + spec.bn_epsilon) ** -0.5
        yield Layer(path, op, kernel, scale, variance, factor)
