"""A graph as an ONNX file: images [batch, height, width, channels] in, one transpose, [batch, channels, ...] inside.

An int8 network is written as QDQ: each tensor is rounded to its codes by QuantizeLinear and DequantizeLinear, kernels
and biases are integers behind DequantizeLinear, and a runtime fuses these into its integer kernels. The ends of an int8
file are float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mobilenet_jax.exporting.arithmetic import LARGEST, SMALLEST
from mobilenet_jax.exporting.graph import (
    LOGITS,
    PIXELS,
    Activate,
    Add,
    Attend,
    AveragePairs,
    Conv,
    Dense,
    Layer,
    Mean,
    Multiply,
    Node,
)
from mobilenet_jax.exporting.quantized import Quantized, Scale

_OPSET, _IR_VERSION = 20, 9  # the first with Gelu; ONNX Runtime has both since 1.17
_FUNCTIONS = {"hard_swish": "HardSwish", "gelu": "Gelu", "sigmoid": "Sigmoid"}


def write_onnx(
    network: Quantized,
    *,
    batch: int | None = None,
    float16: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Return the bytes of an .onnx file.

    Args:
      network: an int8 network, or `as_float` of a float network; of PIXELS, the file takes uint8.
      batch: the number of images at once; None: any.
      float16: store kernels in float16, which are cast when they are used.
      metadata: texts to embed by their names.
    """
    writer = _Writer(network, float16=float16)
    writer.write()
    graph, first = network.graph, TensorProto.UINT8 if network.graph.input == PIXELS else TensorProto.FLOAT
    side = "batch" if batch is None else batch
    proto = helper.make_graph(
        writer.nodes,
        graph.name,
        [helper.make_tensor_value_info(graph.input, first, [side, *graph.input_shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [side, *graph.shape(graph.output)])],
        writer.initializers,
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="mobilenet_jax")
    helper.set_model_props(model, dict(metadata or {}))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


class _Writer:
    """The nodes and initializers of one ONNX graph."""

    def __init__(self, network: Quantized, *, float16: bool):
        self.network, self.graph, self.float16 = network, network.graph, float16
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: set[str] = set()
        self.rounded: dict[str, str] = {}  # value -> the name of its rounded form
        self.maps: dict[str, str] = {}  # value -> its name in ONNX

    def write(self) -> None:
        """Write all nodes, from the graph's input to LOGITS."""
        graph, source = self.graph, self.graph.input
        if source == PIXELS:
            source = self._emit("Cast", [source], f"{PIXELS}/float", to=TensorProto.FLOAT)
        self.maps[graph.input] = self._emit("Transpose", [source], f"{graph.input}/channels_first", perm=[0, 3, 1, 2])
        for node in graph.nodes:
            self._add_node(node)
        self._emit("Identity", [self._read(graph.output, rounded=graph.output not in self.network.floats)], LOGITS)

    def _emit(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def _constant(self, name: str, data: Any) -> str:
        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(np.array(data, order="C"), name))
        return name

    def _read(self, name: str, *, rounded: bool) -> str:
        """Return a value's name, of its rounded form if int8 nodes read it."""
        if not rounded:
            return self.rounded.get(name, self.maps[name])
        if name not in self.rounded:
            scale = self.network.tensors[name]
            given = [
                self._constant(f"{name}/scale", np.float32(scale.scale)),
                self._constant(f"{name}/zero_point", np.int8(scale.zero_point)),
            ]
            codes = self._emit("QuantizeLinear", [self.maps[name], *given], f"{name}/codes")
            self.rounded[name] = self._emit("DequantizeLinear", [codes, *given], f"{name}/rounded")
        return self.rounded[name]

    def _add_node(self, node: Node) -> None:
        is_int8 = node.name not in self.network.floats
        inputs = [self._read(name, rounded=is_int8) for name in node.inputs]
        self.maps[node.name] = node.name
        match node:
            case Conv():
                (top, bottom), (left, right) = node.pads
                inputs += self._weights(node, (3, 2, 0, 1), is_int8=is_int8)
                attributes = {
                    "kernel_shape": node.kernel_shape[:2],
                    "group": node.groups,
                    "strides": [node.stride] * 2,
                    "dilations": [node.dilation] * 2,
                    "pads": [top, left, bottom, right],
                }
                self._activated(node, "Conv", inputs, is_int8=is_int8, **attributes)
            case Dense():
                inputs += self._weights(node, (1, 0), is_int8=is_int8)
                self._activated(node, "Gemm", inputs, is_int8=is_int8, transB=1)
            case Add():
                self._activated(node, "Add", inputs, is_int8=is_int8)
            case Multiply():
                self._emit("Mul", inputs, node.name)
            case Mean() if len(node.shape) == 3:
                self._emit("GlobalAveragePool", inputs, node.name)
            case Mean():
                self._emit("Flatten", [self._emit("GlobalAveragePool", inputs, f"{node.name}/map")], node.name)
            case AveragePairs():
                self._emit("AveragePool", inputs, node.name, kernel_shape=[2, 2], strides=[2, 2])
            case Activate():
                self._emit(_FUNCTIONS[node.function], inputs, node.name)
            case Attend():
                self._attend(node, *inputs)
            case _:
                raise TypeError(f"ONNX has no {type(node).__name__}")

    def _weights(self, node: Layer, axes: tuple[int, ...], *, is_int8: bool) -> list[str]:
        """Write kernel and bias; `axes` is the order of the kernel's axes in ONNX, whose first are the filters."""
        kernel, bias = f"{node.name}/kernel", f"{node.name}/bias"
        if is_int8:
            layer = self.network.layers[node.name]
            codes = layer.kernel.transpose(axes)
            return [
                self._integers(kernel, codes, layer.kernel_scale),
                self._integers(bias, layer.bias, layer.bias_scale),
            ]
        weights = self.network.weights[node.name]
        values = weights.kernel.transpose(axes)
        if not self.float16:
            return [self._constant(kernel, values), self._constant(bias, weights.bias)]
        stored = self._constant(f"{kernel}/float16", values.astype(np.float16))
        return [self._emit("Cast", [stored], kernel, to=TensorProto.FLOAT), self._constant(bias, weights.bias)]

    def _integers(self, name: str, codes: np.ndarray, scale: np.ndarray) -> str:
        scale = scale.astype(np.float32) if len(scale) > 1 else scale.astype(np.float32)[0]
        given = [
            self._constant(f"{name}/codes", codes),
            self._constant(f"{name}/scale", scale),
            self._constant(f"{name}/zero_point", np.zeros(np.shape(scale), codes.dtype)),
        ]
        return self._emit("DequantizeLinear", given, name, axis=0)

    def _activated(
        self, node: Layer | Add, operator: str, inputs: list[str], *, is_int8: bool, **attributes: Any
    ) -> None:
        """Write an operator and its activation, unless the codes of the output saturate where the activation does.

        ONNX Runtime does not fuse an activation between an operator and its QuantizeLinear.
        """
        activation = node.activation
        if is_int8 and _saturates(activation, self.network.tensors[node.name]):
            activation = "linear"
        output = node.name if activation == "linear" else f"{node.name}/linear"
        self._emit(operator, inputs, output, **attributes)
        if activation == "relu":
            self._emit("Relu", [output], node.name)
        elif activation == "relu6":
            limits = [self._constant("zero", np.float32(0)), self._constant("six", np.float32(6))]
            self._emit("Clip", [output, *limits], node.name)

    def _attend(self, node: Attend, query: str, key: str, value: str) -> None:
        """Two matrix products of [channels, pixels]: the heads of the query share key and value."""
        height, width, channels = node.shape
        size = channels // node.heads

        def reshape(source: str, part: str, *shape: int) -> str:
            constant = self._constant(f"{node.name}/{part}/shape", np.array([0, *shape], np.int64))
            return self._emit("Reshape", [source, constant], f"{node.name}/{part}")

        queries = reshape(query, "queries", node.heads, size, -1)
        keys, values = (reshape(x, part, 1, size, -1) for x, part in ((key, "keys"), (value, "values")))
        rows = self._emit("Transpose", [keys], f"{node.name}/key_rows", perm=[0, 1, 3, 2])
        scores = self._emit("MatMul", [rows, queries], f"{node.name}/scores")  # [batch, heads, keys, queries]
        shares = self._emit("Softmax", [scores], f"{node.name}/shares", axis=2)
        attended = self._emit("MatMul", [values, shares], f"{node.name}/attended")
        shape = self._constant(f"{node.name}/shape", np.array([0, channels, height, width], np.int64))
        self._emit("Reshape", [attended, shape], node.name)


def _saturates(activation: str, scale: Scale) -> bool:
    """Return true if the int8 codes cannot stand for numbers that the activation would change."""
    highest = (LARGEST - scale.zero_point) * float(scale.scale)
    return scale.zero_point == SMALLEST and (activation == "relu" or highest < 6 * (1 + 1e-5))
