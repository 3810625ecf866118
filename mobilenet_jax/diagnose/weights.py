"""What weights alone say, layer by layer: dead filters, variances near 0, the cost of int8, the rank of kernels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mobilenet_jax.diagnose.measures import DEAD, measure_int8, measure_rank, norm_shrink, quantise, relative_norms
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


def measure_layer(layer: Layer, epsilon: float) -> dict:
    """A layer's entry of the report without its activations, as `report.py` documents it."""
    folded = layer.kernel * layer.factor
    return {
        "path": layer.path,
        "kind": layer.kind,
        "activation": layer.op.activation,
        "channels": layer.op.filters,
        "dead_filters": find_dead_filters(layer),
        "norm": None if layer.variance is None else _measure_norm(layer.variance, epsilon),
        "int8": measure_int8(folded),
        "kernel_rank": measure_rank(kernel_variances(folded)) if layer.kind in ("pointwise", "dense") else None,
    }


def find_dead_filters(layer: Layer) -> list[dict]:
    """Filters below DEAD of a usual one of the layer, batch norm folded in (see `relative_norms`).

    {"channel", "relative_norm", "cause"}: "kernel" where its weights alone are that small, "scale" where the batch
    norm's scale is, "both" of them together or each.
    """
    relative = relative_norms(layer.kernel, layer.factor)
    by_kernel = relative_norms(layer.kernel, np.ones(layer.op.filters)) < DEAD
    scale = np.ones(layer.op.filters) if layer.scale is None else layer.scale
    by_scale = relative_norms(scale[None, :], np.ones(layer.op.filters)) < DEAD
    return [
        {
            "channel": int(channel),
            "relative_norm": float(relative[channel]),
            "cause": "both" if by_kernel[channel] == by_scale[channel] else "kernel" if by_kernel[channel] else "scale",
        }
        for channel in np.flatnonzero(relative < DEAD)
    ]


def _measure_norm(variance: np.ndarray, epsilon: float) -> dict:
    """Below epsilon it is epsilon, not the variance, that decides a channel's scale."""
    return {
        "epsilon": epsilon,
        "smallest_variance": float(variance.min()),
        "below_epsilon": np.flatnonzero(variance < epsilon).tolist(),
        "smallest_shrink": float(norm_shrink(variance, epsilon).min()),
    }


def kernel_variances(kernel: np.ndarray) -> np.ndarray:
    """Squared singular values of a kernel [..., C_in, C_out] as a matrix to its outputs."""
    return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False) ** 2


def quantise_variables(spec: Spec, variables: dict, *, per_channel: bool) -> dict:
    """The variables with every kernel as int8 would have it: folded with its batch norm, rounded, and unfolded."""
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(variables, sep="/"))
    for layer in list_layers(spec, variables):
        rounded = quantise(layer.kernel * layer.factor, per_channel=per_channel)
        name = f"params/{layer.path}/{'kernel' if layer.op.bias else 'conv/kernel'}"
        # Where the factor is 0 nothing comes through, whatever the weights are.
        usable = layer.factor != 0
        leaves[name] = np.where(usable, rounded / np.where(usable, layer.factor, 1), layer.kernel).astype(np.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")


def count_dead_filters(spec: Spec, params: Any, batch_stats: Any) -> dict[str, tuple[Any, Any]]:
    """Counts over all depthwise layers as (count, 1), for a training run's metrics; runs under `jit`.

    `dead_filters`; `filters_below_1e-4` to `_1e-1` of a usual filter of the layer, a histogram in decades; and
    `variances_below_epsilon` of all batch norms.
    """
    below = dict.fromkeys(("1e-4", "1e-3", "1e-2", "1e-1"), jnp.zeros(()))
    dead = variances = jnp.zeros(())
    for layer in list_layers(spec, {"params": params, "batch_stats": batch_stats}):
        if layer.variance is not None:
            variances += jnp.sum(layer.variance < spec.bn_epsilon)
        if layer.op.depthwise:
            relative = relative_norms(layer.kernel, layer.factor, xp=jnp)
            dead += jnp.sum(relative < DEAD)
            below = {limit: count + jnp.sum(relative < float(limit)) for limit, count in below.items()}
    counts = {"dead_filters": dead, **{f"filters_below_{k}": v for k, v in below.items()}}
    return {name: (value, jnp.ones(())) for name, value in (counts | {"variances_below_epsilon": variances}).items()}
