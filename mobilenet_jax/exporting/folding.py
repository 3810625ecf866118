"""The kernels and biases of a graph's layers, computed from the variables of a network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mobilenet_jax.exporting.graph import Graph, Layer, Source
from mobilenet_jax.models.folded import norm_factor


class Weights(NamedTuple):
    """The kernel and the bias of a layer, with its batch norm folded."""

    kernel: Any  # of the layer's kernel_shape; the last axis are the filters
    bias: Any  # [filters]


def fold_weights(graph: Graph, variables: Mapping) -> dict[str, Weights]:
    """Return the kernel and bias of each layer by its name, with batch norm, layer scale and gates folded.

    The arithmetic works on arrays of NumPy and JAX, also traced ones, in their dtype: gradients reach the variables
    through it. `Source` has the formulas, and `fold_norm` the factor and shift of each layer's batch norm.

    Args:
      graph: of `build_graph`.
      variables: {"params", "batch_stats"} of the same network.
    """
    leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    return {layer.name: _fold(layer, leaves) for layer in graph.layers()}


def read_weights(graph: Graph, variables: Mapping) -> dict[str, Weights]:
    """Return `fold_weights` in float32 NumPy arrays, computed in float64 and rounded once."""
    leaves = traverse_util.flatten_dict(dict(variables), sep="/")
    wide = traverse_util.unflatten_dict({path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}, sep="/")
    folded = fold_weights(graph, wide)
    return {name: Weights(*(np.asarray(array, np.float32) for array in pair)) for name, pair in folded.items()}


def fold_norm(source: Source, leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return (factor, shift) [filters] of a layer's batch norm: it computes x * factor + shift.

    `leaves` are the variables by path, as `params/stem/norm/scale`. Without a norm, the factor is 1 and the shift 0.
    """
    if not source.norm:
        return 1.0, 0.0
    scale, bias = (leaves[f"params/{source.norm}/{leaf}"] for leaf in ("scale", "bias"))
    mean, var = (leaves[f"batch_stats/{source.norm}/{leaf}"] for leaf in ("mean", "var"))
    factor = norm_factor(scale, var, source.epsilon)
    return factor, bias - mean * factor


def _fold(layer: Layer, leaves: Mapping[str, Any]) -> Weights:
    source = layer.source
    factor, bias = fold_norm(source, leaves)
    if source.bias:
        bias = leaves[f"params/{source.bias}"]
    gamma = leaves[f"params/{source.gamma}"] if source.gamma else 1.0
    if source.kernel:
        kernel = leaves[f"params/{source.kernel}"].reshape(layer.kernel_shape)
    else:
        kernel = np.broadcast_to(np.asarray(source.constant), layer.kernel_shape)
    scale = factor * gamma
    if np.ndim(scale):
        scale = scale.reshape((1,) * (len(layer.kernel_shape) - 1) + layer.kernel_shape[-1:])
    kernel = kernel * scale * (source.before * source.after)
    shift = np.broadcast_to(np.asarray(source.shift), layer.kernel_shape[-1:])
    return Weights(kernel, bias * gamma * source.after + shift)
