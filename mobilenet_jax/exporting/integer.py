"""A graph as int8 kernels run it: the one formulation that post-training quantization, training and files share.

`quantize_layers` computes the integers of a network's weights and `run_levels` runs the network with them. Both are
traced by the program that calibrates, by the training step and by the exporter, so a file holds the integers that the
simulation multiplied. For the same codes, LiteRT's codes are equal to those of `run_levels`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.exporting import arithmetic
from mobilenet_jax.exporting.arithmetic import LARGEST, SMALLEST, Encoding
from mobilenet_jax.exporting.folding import Weights, fold_weights
from mobilenet_jax.exporting.graph import (
    IMAGES,
    PIXELS,
    Activate,
    Add,
    Attend,
    AveragePairs,
    Conv,
    Graph,
    Layer,
    Mean,
    Multiply,
    Node,
)
from mobilenet_jax.exporting.interpreter import FUNCTIONS, run
from mobilenet_jax.exporting.quantized import Quantized, QuantizedLayer, Scale

# The int8 kernel of the sigmoid takes no other encoding of its output.
_SIGMOID = Scale(1 / 256, SMALLEST)
_PIXELS = Scale(1.0, SMALLEST)  # grey levels 0 to 255 are the levels themselves
# Grey levels normalised to -1 ... 1 would lie halfway between two codes, all of them, and rounding half to even would
# give 256 levels 129 codes. This factor of the range of the images moves them away from the halves: 255 codes.
_IMAGES_ROOM = np.float32(1 + 2**-9)
# Logits above the range would all get the largest code, and the answer would be a draw between them. Images of another
# kind than those of the calibration have larger logits: photographs 1.6 times those of clip art, in torchvision's V2.
_LOGITS_ROOM = np.float32(1.5)
Ranges = Mapping[str, Any]  # by tensor: the smallest and the largest number, float32 [2]


class IntegerLayer(NamedTuple):
    """The integers of a layer, in float32 arrays of JAX or NumPy."""

    kernel: Any  # of the layer's kernel_shape
    kernel_scale: Any  # [filters]
    unit: Any  # [filters]: what 1 in the bias and in the sums stands for
    bias: Any  # [filters]


def list_ranges(graph: Graph) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges must be known, in running order."""
    return tuple(name for name in (graph.input, *graph.by_name) if _given_encoding(graph, name) is None)


def _given_encoding(graph: Graph, name: str) -> str | Scale | None:
    """Return the encoding that a tensor has whatever its range, or the tensor that it shares its encoding with."""
    if name == PIXELS:
        return _PIXELS
    match graph.by_name.get(name):
        case AveragePairs(inputs=(source,)):
            return source
        case Activate(function="sigmoid"):
            return _SIGMOID
    return None


def list_floats(graph: Graph) -> frozenset[str]:
    """Return the names of the nodes that compute in float32: the products of attention, which lose most in int8."""
    return frozenset(node.name for node in graph.nodes if isinstance(node, Attend))


def make_encodings(graph: Graph, ranges: Ranges) -> dict[str, Encoding]:
    """Return the encoding of every tensor; those of images and logits have some room beyond the range."""
    found: dict[str, Encoding] = {}
    for name in (graph.input, *graph.by_name):
        match _given_encoding(graph, name):
            case None:
                room = {IMAGES: _IMAGES_ROOM, graph.output: _LOGITS_ROOM}.get(name, np.float32(1))
                found[name] = arithmetic.make_encoding(ranges[name][0] * room, ranges[name][1] * room)
            case Scale(scale, zero):
                found[name] = Encoding(jnp.float32(scale), jnp.int32(zero))
            case str() as source:
                found[name] = found[source]
    return found


def quantize_layers(
    graph: Graph, weights: Mapping[str, Weights], encodings: Mapping[str, Encoding], *, per_tensor: bool = False
) -> dict[str, IntegerLayer]:
    """Return the integers of every layer; `per_tensor` gives all filters of a layer one scale."""
    found = {}
    for layer in graph.layers():
        # The barrier keeps XLA from folding weights into the rounding, in one program so and otherwise in another.
        kernel, bias = arithmetic.keep(tuple(jnp.asarray(array) for array in weights[layer.name]))
        levels, scales = arithmetic.quantize_kernel(kernel, per_tensor=per_tensor)
        unit = arithmetic.keep(scales * encodings[layer.inputs[0]].scale)
        found[layer.name] = IntegerLayer(levels, scales, unit, arithmetic.quantize_bias(bias, unit))
    return found


def run_levels(
    graph: Graph,
    layers: Mapping[str, IntegerLayer],
    encodings: Mapping[str, Encoding],
    inputs: jax.Array,
    *,
    observe: Callable[[str, jax.Array], None] | None = None,
) -> dict[str, jax.Array]:
    """Return the levels of every tensor by its name.

    Args:
      graph: the network.
      layers: of `quantize_layers`.
      encodings: of `make_encodings`.
      inputs: numbers [B, H, W, C] of the graph's input, not levels.
      observe: called with the name of each tensor and its numbers before they are rounded and saturated to int8.
    """
    values: dict[str, jax.Array] = {}

    def finish(name: str, x: jax.Array, activation: str = "linear") -> None:
        if observe:
            observe(name, FUNCTIONS[activation](arithmetic.decode(x, encodings[name])))
        values[name] = arithmetic.saturate(x, encodings[name], activation)

    with jax.default_matmul_precision("highest"):
        finish(graph.input, arithmetic.encode(inputs.astype(jnp.float32), encodings[graph.input]))
        for node in graph.nodes:
            given = [values[name] for name in node.inputs]
            scales, output = [encodings[name] for name in node.inputs], encodings[node.name]
            if isinstance(node, Layer):
                finish(node.name, run_layer(node, layers[node.name], given[0], output), node.activation)
            else:
                activation = node.activation if isinstance(node, Add) else "linear"
                finish(node.name, run_node(node, given, scales, output), activation)
    return values


def run_layer(node: Layer, layer: IntegerLayer, x: jax.Array, output: Encoding) -> jax.Array:
    """Return a layer's output in levels of `output`, before they are rounded, without the activation."""
    if isinstance(node, Conv):
        window = {"stride": node.stride, "pads": node.pads, "dilation": node.dilation}
        parts = arithmetic.convolve(x, layer.kernel, groups=node.groups, **window)
    else:
        parts = arithmetic.multiply_matrix(x, layer.kernel)
    return arithmetic.rescale(arithmetic.accumulate(parts, layer.bias), layer.unit, output)


def run_node(node: Node, given: list[jax.Array], scales: list[Encoding], output: Encoding) -> jax.Array:
    """Return the output of a node without weights in levels of `output`, before they are rounded."""
    match node:
        case Add():
            return arithmetic.add(given[0], given[1], (scales[0], scales[1]), output)
        case Multiply():
            return arithmetic.multiply(given[0], given[1], (scales[0], scales[1]), output)
        case Mean():
            return arithmetic.mean(given[0], scales[0], output).reshape(-1, *node.shape)
        case AveragePairs():
            return arithmetic.average_pairs(given[0], output)
        case Activate(function="hard_swish"):
            return arithmetic.hard_swish(given[0], scales[0], output)
        case Activate():
            return arithmetic.activate(given[0], FUNCTIONS[node.function], scales[0], output)
        case Attend():
            numbers = [arithmetic.decode(x, scale) for x, scale in zip(given, scales, strict=True)]
            return arithmetic.encode(run(node, *numbers), output)
    raise TypeError(f"{type(node).__name__} is no operation of a graph")


@functools.partial(jax.jit, static_argnames=("graph", "per_tensor"))
def _quantize_weights(graph, weights, ranges, per_tensor):
    encodings = make_encodings(graph, ranges)
    return encodings, quantize_layers(graph, weights, encodings, per_tensor=per_tensor)


@functools.partial(jax.jit, static_argnames="graph")
def _quantize_variables(graph, variables, ranges):
    encodings = make_encodings(graph, ranges)
    return encodings, quantize_layers(graph, fold_weights(graph, variables), encodings)


def make_quantized(
    graph: Graph, weights: Mapping[str, Weights], ranges: Ranges, *, per_tensor: bool = False
) -> Quantized:
    """Return the int8 network of float weights and ranges.

    Args:
      graph: the network.
      weights: float32, of `folding.fold_weights`.
      ranges: of every tensor that `list_ranges` names.
      per_tensor: one scale for all filters of a layer.
    """
    return _pack(graph, *_quantize_weights(graph, dict(weights), dict(ranges), per_tensor), per_tensor=per_tensor)


def make_trained(graph: Graph, variables: Mapping, ranges: Ranges) -> Quantized:
    """Return the int8 network that a run has trained, of its ranges and of variables folded as its steps fold them."""
    used = {name: variables[name] for name in ("params", "batch_stats")}
    needed = {name: ranges[name] for name in list_ranges(graph)}
    return _pack(graph, *_quantize_variables(graph, used, needed), per_tensor=False)


def _pack(graph: Graph, encodings: dict, layers: dict, *, per_tensor: bool) -> Quantized:
    encodings, layers = jax.device_get((encodings, layers))
    return Quantized(
        graph=graph,
        tensors={name: Scale(float(e.scale), int(e.zero)) for name, e in encodings.items()},
        layers={name: _to_quantized(layer, per_tensor) for name, layer in layers.items()},
        floats=list_floats(graph),
    )


def _to_quantized(layer: IntegerLayer, per_tensor: bool) -> QuantizedLayer:
    count = 1 if per_tensor else None
    return QuantizedLayer(
        kernel=layer.kernel.astype(np.int8),
        kernel_scale=layer.kernel_scale[:count],
        bias=layer.bias.astype(np.int32),
        bias_scale=layer.unit[:count],
    )


@functools.partial(jax.jit, static_argnames="graph")
def _run_codes(graph, layers, encodings, inputs):
    levels = run_levels(graph, layers, encodings, inputs)[graph.output]
    return (levels + encodings[graph.output].zero).astype(jnp.int8)


def simulate(network: Quantized, inputs: np.ndarray) -> np.ndarray:
    """Return the int8 codes of the output that LiteRT computes of inputs [B, H, W, C]: numbers, or uint8 pixels."""
    encodings = {name: Encoding(np.float32(s.scale), np.int32(s.zero_point)) for name, s in network.tensors.items()}
    layers = {}
    for name, layer in network.layers.items():
        scale, unit = (np.broadcast_to(a, layer.bias.shape) for a in (layer.kernel_scale, layer.bias_scale))
        layers[name] = IntegerLayer(layer.kernel.astype(np.float32), scale, unit, layer.bias.astype(np.float32))
    return np.asarray(_run_codes(network.graph, layers, encodings, inputs))


def encode(numbers: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the int8 codes of numbers, rounded as LiteRT's QUANTIZE does."""
    codes = np.rint(np.float32(numbers) * (np.float32(1) / np.float32(scale.scale))) + scale.zero_point
    return np.clip(codes, SMALLEST, LARGEST).astype(np.int8)


def decode(codes: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the numbers of int8 codes."""
    return (codes.astype(np.float32) - scale.zero_point) * np.float32(scale.scale)
