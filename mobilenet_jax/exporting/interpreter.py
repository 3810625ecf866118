"""A graph run in JAX, in the dtype of its weights: what the files are compared with, and what calibration measures."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import (
    Activate,
    Add,
    Attend,
    AveragePairs,
    Conv,
    Dense,
    Graph,
    Layer,
    Mean,
    Multiply,
    Node,
)
from mobilenet_jax.models.activations import ACTIVATIONS, GATES
from mobilenet_jax.models.attention import attend
from mobilenet_jax.models.cpu import depthwise_conv, full_conv
from mobilenet_jax.models.layers import average_pairs

FUNCTIONS = {**GATES, **ACTIVATIONS}


def run_graph(graph: Graph, weights: Mapping[str, Weights], inputs: jax.Array) -> dict[str, jax.Array]:
    """Return every tensor of the graph by its name, from the input [B, H, W, C] to the output."""
    values = {graph.input: inputs.astype(jnp.float32) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs}
    for node in graph.nodes:
        given = [values[name] for name in node.inputs]
        values[node.name] = (
            run_layer(node, weights[node.name], *given) if isinstance(node, Layer) else run(node, *given)
        )
    return values


def run_layer(node: Layer, weights: Weights, x: jax.Array) -> jax.Array:
    """Return the output of a layer with its bias and activation."""
    y = multiply_kernel(node, x, weights.kernel)
    bias = jnp.asarray(weights.bias)
    return FUNCTIONS[node.activation](y + bias.reshape((1,) * (y.ndim - 1) + bias.shape))


def multiply_kernel(node: Layer, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return a layer's product with its kernel, before bias and activation."""
    kernel = jnp.asarray(kernel)
    if isinstance(node, Dense):
        return x @ kernel
    assert isinstance(node, Conv)
    if node.depthwise:
        return depthwise_conv(x, kernel, stride=node.stride, pads=node.pads, dilation=node.dilation)
    return full_conv(x, kernel, stride=node.stride, pads=node.pads, dilation=node.dilation, groups=node.groups)


def run(node: Node, x: jax.Array, *others: jax.Array) -> jax.Array:
    """Return the output of a node without weights."""
    match node:
        case Add():
            return FUNCTIONS[node.activation](x + others[0])
        case Multiply():
            return x * others[0]
        case Mean():
            return jnp.mean(x, axis=(1, 2), keepdims=len(node.shape) == 3)
        case AveragePairs():
            return average_pairs(x)
        case Activate():
            return FUNCTIONS[node.function](x)
        case Attend():
            # `attend` scales the queries, and these are scaled already.
            return attend(x * others[0].shape[-1] ** 0.5, *others, heads=node.heads)
    raise TypeError(f"{type(node).__name__} is no operation of a graph")
