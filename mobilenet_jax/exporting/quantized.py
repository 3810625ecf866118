"""An int8 network as data: the graph of the float network, and the integers and scales of its tensors and layers.

The scheme is TFLite's. A tensor of codes q stands for scale * (q - zero_point). Kernels are symmetric. Biases are int32
in units of the input's scale times the filter's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import Graph


class Scale(NamedTuple):
    """How the int8 codes of a tensor stand for numbers."""

    scale: float  # a float32 value
    zero_point: int  # from -128 to 127


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """The integers of a layer."""

    kernel: np.ndarray  # int8, in the layout of the layer's kernel_shape
    kernel_scale: np.ndarray  # float32 [filters], or [1] if one scale is for all filters
    bias: np.ndarray  # int32 [filters], in units of bias_scale
    bias_scale: np.ndarray  # float32, of kernel_scale's shape: the input's scale times kernel_scale


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """An int8 network.

    A node computes in int8 if its name is not in `floats`. Then `tensors` has its output and all of its inputs, and
    `layers` has its integers if it is a layer. Where an int8 node reads the output of a float node, or a float node
    that of an int8 node, the writers convert with the scale of that tensor.
    """

    graph: Graph
    tensors: Mapping[str, Scale]  # by the name of the node or of the graph's input
    layers: Mapping[str, QuantizedLayer]  # by the name of the layer
    floats: frozenset[str] = frozenset()  # nodes that compute in float32, such as attention's products
    weights: Mapping[str, Weights] = field(default_factory=dict)  # float32, of the layers among `floats`


def as_float(graph: Graph, weights: Mapping[str, Weights]) -> Quantized:
    """Return a network of which no node computes in int8: what the writers take for a float file."""
    floats = frozenset(node.name for node in graph.nodes)
    return Quantized(graph=graph, tensors={}, layers={}, floats=floats, weights=weights)
