"""Post-training quantization: from a float network and some images to an int8 network."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.exporting.arithmetic import quantize_kernel
from mobilenet_jax.exporting.calibrate import BATCH, measure_ranges
from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import Conv, Graph, Layer
from mobilenet_jax.exporting.integer import make_quantized
from mobilenet_jax.exporting.interpreter import multiply_kernel, run_graph
from mobilenet_jax.exporting.quantized import Quantized

_ROUNDS = 20  # of equalisation over all pairs, because each pair changes its neighbours
_LIMIT = 100.0  # by which equalisation may scale a channel, so that a filter of nearly 0 does not explode


def quantize(
    graph: Graph,
    weights: Mapping[str, Weights],
    images: np.ndarray,
    *,
    ranges: str = "percentile",
    equalize: bool = False,
    correct_bias: bool = True,
    per_tensor: bool = False,
) -> Quantized:
    """Return the int8 network of a float network, calibrated on images.

    The defaults are the best of the methods that docs/int8.md compares.

    Args:
      graph: the network.
      weights: float32, of `folding.read_weights`.
      images: [N, H, W, C], as the graph's input takes them; some hundred that are like those that will come.
      ranges: how ranges follow from the images, see `calibrate.measure_ranges`.
      equalize: scale channels before, see `equalize_layers`.
      correct_bias: correct biases after, see `correct_biases`.
      per_tensor: one scale for all filters of a layer instead of one for each; less exact, for comparison.

    Raises ValueError for an unknown method, or images that do not fit.
    """
    if equalize:
        graph, weights = equalize_layers(graph, weights)
    measured = measure_ranges(graph, weights, images, method=ranges)
    if correct_bias:
        weights = correct_biases(graph, weights, images, per_tensor=per_tensor)
    return make_quantized(graph, weights, measured, per_tensor=per_tensor)


def equalize_layers(graph: Graph, weights: Mapping[str, Weights]) -> tuple[Graph, dict[str, Weights]]:
    """Return the graph and weights with the channels between two layers scaled to equal extents of both kernels.

    Cross-layer equalisation (Nagel et al. 2019, arXiv 1906.04721, section 4.1): where the output of a layer is read by
    one other layer alone, channel i is divided by s_i = sqrt(r1_i r2_i) / r2_i in the first and multiplied in the
    second; r1_i and r2_i are the largest absolute weights of the channel. A ReLU between them commutes with that. A
    ReLU6 does not, and becomes a ReLU (section 5.1.1 there), so the float network changes where it saturated.
    """
    pairs = find_pairs(graph)
    weights = {name: Weights(*(np.array(array) for array in pair)) for name, pair in weights.items()}
    for _ in range(_ROUNDS):
        for first, second in pairs:
            _equalize_pair(weights, first, second)
    relus = {first.name for first, _ in pairs if first.activation == "relu6"}
    nodes = [replace(node, activation="relu") if node.name in relus else node for node in graph.nodes]  # pyright: ignore[reportCallIssue]
    return replace(graph, nodes=tuple(nodes)), weights


def find_pairs(graph: Graph) -> list[tuple[Layer, Layer]]:
    """Return the pairs of layers of which the second alone reads the output of the first, in running order."""
    readers: dict[str, list] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    pairs = []
    for first in graph.layers():
        match readers.get(first.name):
            case [Conv() as second] if second.groups == 1 or second.depthwise:
                pairs.append((first, second))
    return pairs


def _equalize_pair(weights: dict[str, Weights], first: Layer, second: Layer) -> None:
    before, after = weights[first.name], weights[second.name]
    axis = 3 if isinstance(second, Conv) and second.depthwise else 2  # of the channels between the two layers
    largest = np.max(np.abs(before.kernel), axis=tuple(range(before.kernel.ndim - 1)))
    following = np.max(np.abs(after.kernel), axis=tuple(i for i in range(4) if i != axis))
    usable = (largest > 0) & (following > 0)
    ratio = np.sqrt(np.where(usable, largest, 1) / np.where(usable, following, 1))
    factor = np.clip(ratio, 1 / _LIMIT, _LIMIT).astype(np.float32)
    shape = [1] * 4
    shape[axis] = -1
    weights[first.name] = Weights(before.kernel / factor, before.bias / factor)
    weights[second.name] = Weights(after.kernel * factor.reshape(shape), after.bias)


def correct_biases(
    graph: Graph, weights: Mapping[str, Weights], images: np.ndarray, *, per_tensor: bool = False
) -> dict[str, Weights]:
    """Return the weights with biases that cancel the mean effect of rounding each kernel.

    Rounding a kernel by e shifts the mean output of a layer by the mean of e * x (Nagel et al. 2019, arXiv 1906.04721,
    section 4.2). The mean is measured on the inputs x that the float network has for the images.
    """
    total: dict[str, Any] = {}
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        shifts = jax.device_get(_measure_shifts(graph, dict(weights), batch, per_tensor))
        total = {name: total.get(name, 0) + np.float64(shift) * len(batch) for name, shift in shifts.items()}
    return {
        name: Weights(kernel, np.float32(bias - total[name] / len(images))) for name, (kernel, bias) in weights.items()
    }


@functools.partial(jax.jit, static_argnames=("graph", "per_tensor"))
def _measure_shifts(graph, weights, images, per_tensor):
    values = run_graph(graph, weights, images)
    shifts = {}
    for layer in graph.layers():
        kernel = weights[layer.name].kernel
        levels, scales = quantize_kernel(kernel, per_tensor=per_tensor)
        error = levels * scales.reshape(*[1] * (kernel.ndim - 1), -1) - kernel
        shift = multiply_kernel(layer, values[layer.inputs[0]], error)
        shifts[layer.name] = jnp.mean(shift, axis=tuple(range(shift.ndim - 1)))
    return shifts
