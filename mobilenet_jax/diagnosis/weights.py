"""Measures of weights alone, layer by layer: dead filters, variances near 0, the cost of int8, the rank of kernels."""

from typing import Any

import numpy as np
from flax import traverse_util

from mobilenet_jax.diagnosis.measures import measure_int8, measure_rank, norm_shrink, quantise
from mobilenet_jax.models.folded import Layer, list_layers
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.dead_filters import DEAD, relative_norms


def measure_layer(layer: Layer, epsilon: float) -> dict:
    """Return a layer's entry of the report, without its activations; `report.py` describes the keys."""
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
    """List the filters whose norm, with the batch norm folded in, is below DEAD (see `relative_norms`).

    Returns:
      [{"channel", "relative_norm", "cause"}]. The cause is "kernel" if only the weights are below DEAD by themselves,
      "scale" if only the batch norm's scale is, and "both" if each is or only their product is.
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
    # Where a variance is below epsilon, epsilon decides the channel's scale.
    return {
        "epsilon": epsilon,
        "smallest_variance": float(variance.min()),
        "below_epsilon": np.flatnonzero(variance < epsilon).tolist(),
        "smallest_shrink": float(norm_shrink(variance, epsilon).min()),
    }


def kernel_variances(kernel: np.ndarray) -> np.ndarray:
    """Return the squared singular values of a kernel [..., C_out] as a matrix [-1, C_out]."""
    return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False) ** 2


def quantise_variables(spec: Spec, variables: dict, *, per_channel: bool) -> dict:
    """Return the variables with every kernel folded with its batch norm, rounded to int8, and unfolded again."""
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(variables, sep="/"))
    for layer in list_layers(spec, variables):
        rounded = quantise(layer.kernel * layer.factor, per_channel=per_channel)
        # Where the factor is 0 the output does not depend on the weights.
        usable = layer.factor != 0
        unfolded = np.where(usable, rounded / np.where(usable, layer.factor, 1), layer.kernel)
        leaves[layer.kernel_path] = unfolded.astype(np.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")
