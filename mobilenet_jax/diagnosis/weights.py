"""What weights alone say, layer by layer: dead filters, variances near 0, the cost of int8, the rank of kernels."""

from typing import Any

import numpy as np
from flax import traverse_util

from mobilenet_jax.diagnosis.measures import measure_int8, measure_rank, norm_shrink, quantise
from mobilenet_jax.models.folded import Layer, list_layers
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.dead_filters import DEAD, relative_norms


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
        # Where the factor is 0 nothing comes through, whatever the weights are.
        usable = layer.factor != 0
        unfolded = np.where(usable, rounded / np.where(usable, layer.factor, 1), layer.kernel)
        leaves[layer.kernel_path] = unfolded.astype(np.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")
