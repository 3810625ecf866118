"""The layers of a network with their kernels, and the factors by which batch norm folds into them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import traverse_util

from mobilenet_jax.models.ops import ConvOp, DenseOp, DepthwiseOp
from mobilenet_jax.models.spec import Spec


@dataclass(frozen=True)
class Layer:
    """A convolution or dense layer with the batch norm behind it."""

    path: str  # of the module: "block_03/depthwise"
    op: ConvOp | DenseOp
    kernel: Any  # [..., C]
    scale: Any  # [C], batch norm's; None without a norm
    variance: Any  # [C], the running variance; None without a norm
    factor: Any  # [C], by which the norm multiplies the kernel: scale / sqrt(variance + epsilon), 1 without a norm

    @property
    def kind(self) -> str:
        """Depthwise, pointwise, full (a convolution over space and channels) or dense."""
        if isinstance(self.op, DenseOp):
            return "dense"
        if isinstance(self.op, DepthwiseOp):
            return "depthwise"
        return "pointwise" if self.op.kernel == 1 else "full"

    @property
    def kernel_path(self) -> str:
        """The kernel's path in the variables: "params/block_03/depthwise/conv/kernel"."""
        return f"params/{self.path}/{'kernel' if isinstance(self.op, DenseOp) else 'conv/kernel'}"


def norm_factor(scale: Any, variance: Any, epsilon: float) -> Any:
    """Return the factors [C] by which batch norm with these running variances multiplies a map."""
    return scale * (variance + epsilon) ** -0.5


def list_layers(spec: Spec, variables: dict) -> Iterator[Layer]:
    """Yield the layers with a kernel, from the stem to the classifier.

    The variables are arrays of NumPy or JAX, or traced.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    for path, op in spec.layers():
        if not isinstance(op, ConvOp | DenseOp):
            continue
        scale = variance = None
        factor = np.ones(op.filters, np.float32)
        if isinstance(op, ConvOp) and op.norm:
            scale, variance = leaves[f"params/{path}/norm/scale"], leaves[f"batch_stats/{path}/norm/var"]
            factor = norm_factor(scale, variance, spec.bn_epsilon)
        layer = Layer(path, op, None, scale, variance, factor)
        yield replace(layer, kernel=leaves[layer.kernel_path])
