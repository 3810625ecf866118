"""A graph as a TFLite file, written through the schema that `ai-edge-litert` ships.

Padding is SAME where a layer's pads are those of TensorFlow's rule, and otherwise PAD and VALID. Activations are fused
as in the graph. An int8 node reads and writes int8 tensors; between int8 and float nodes stand QUANTIZE and DEQUANTIZE.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from mobilenet_jax.exporting.graph import (
    IMAGES,
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
from mobilenet_jax.models.ops import pads

_FUSED = {
    "linear": schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}
_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int32": schema.TensorType.INT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
}
_PIXEL_SCALE = Scale(1.0, 0)  # of uint8 pixels: a code is its grey level
# The first version of an operator whose kernels take int8, if it is not 1 (tflite/tools/versioning/op_version.cc).
_INT8_VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 4,
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "LOGISTIC": 2,
    "MEAN": 2,
    "MUL": 2,
    "PAD": 2,
}


def write_tflite(
    network: Quantized,
    *,
    batch: int | None = 1,
    float16: bool = False,
    float_ends: bool = False,
    metadata: Mapping[str, bytes] | None = None,
) -> bytes:
    """Return the bytes of a .tflite file.

    Args:
      network: an int8 network, or `as_float` of a float network; of PIXELS, the file takes uint8.
      batch: the number of images at once; None: any.
      float16: store the kernels of float nodes in float16; runtimes widen them when they load the file.
      float_ends: an int8 network takes and returns float32 numbers, not int8 codes.
      metadata: buffers to embed by their names.
    """
    return _Writer(network, batch=batch, float16=float16, float_ends=float_ends).write(metadata or {})


class _Writer:
    """The tensors, buffers and operators of one subgraph."""

    def __init__(self, network: Quantized, *, batch: int | None, float16: bool, float_ends: bool):
        self.network, self.graph, self.batch = network, network.graph, batch
        self.float16, self.float_ends = float16, float_ends
        self.buffers: list[Any] = [schema.BufferT()]  # the first is empty, for tensors without data
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[tuple[str, int], int] = {}  # (operator, version) -> index
        self.index: dict[tuple[str, str], int] = {}  # (value, type) -> tensor

    def write(self, metadata: Mapping[str, bytes]) -> bytes:
        """Return the file."""
        graph = self.graph
        is_float = self.float_ends or graph.nodes[0].name in self.network.floats
        first = self._value(graph.input, "uint8" if graph.input == PIXELS else "float32" if is_float else "int8")
        for node in graph.nodes:
            self._add_node(node)
        is_float = self.float_ends or graph.output in self.network.floats
        last = self._read(graph.output, "float32" if is_float else "int8")
        entries = [schema.MetadataT(name=name, buffer=self._buffer(data)) for name, data in metadata.items()]
        subgraph = schema.SubGraphT(
            name="main", tensors=self.tensors, operators=self.operators, inputs=_ints(first), outputs=_ints(last)
        )
        signature = schema.SignatureDefT(
            signatureKey="serving_default",
            inputs=[schema.TensorMapT(name=IMAGES, tensorIndex=first)],
            outputs=[schema.TensorMapT(name=LOGITS, tensorIndex=last)],
            subgraphIndex=0,
        )
        model = schema.ModelT(
            version=3,
            description=graph.name,
            buffers=self.buffers,
            operatorCodes=[_operator_code(*code) for code in self.codes],
            subgraphs=[subgraph],
            signatureDefs=[signature],
            metadata=entries,
        )
        return bytes(flatbuffer_utils.convert_object_to_bytearray(model))  # pyright: ignore[reportArgumentType]

    def _buffer(self, data: bytes) -> int:
        self.buffers.append(schema.BufferT(data=np.frombuffer(data, np.uint8)))
        return len(self.buffers) - 1

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str, *, scale: Any = None, **fields: Any) -> int:
        """Append a tensor; `scale` is its QuantizationParametersT."""
        tensor = schema.TensorT(
            name=name, shape=_ints(*shape), type=_TYPES[dtype], quantization=scale, hasRank=True, **fields
        )
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _constant(self, name: str, data: np.ndarray, scale: Any = None) -> int:
        data = np.ascontiguousarray(data)
        return self._tensor(name, data.shape, data.dtype.name, scale=scale, buffer=self._buffer(data.tobytes()))

    def _batched(self, name: str, shape: tuple[int, ...], dtype: str, scale: Scale | None) -> int:
        """Append a tensor with a batch before its shape."""
        any_size = {"shapeSignature": _ints(-1, *shape)} if self.batch is None else {}
        quantization = None if scale is None else _parameters(np.array([scale.scale], np.float32), scale.zero_point)
        return self._tensor(name, (self.batch or 1, *shape), dtype, scale=quantization, **any_size)

    def _value(self, name: str, dtype: str) -> int:
        """Append a value of the graph in one of its types."""
        scale = {"float32": None, "uint8": _PIXEL_SCALE}.get(dtype) if dtype != "int8" else self.network.tensors[name]
        taken = any(known == name for known, _ in self.index)
        index = self._batched(f"{name}/{dtype}" if taken else name, self.graph.shape(name), dtype, scale)
        self.index[name, dtype] = index
        return index

    def _read(self, name: str, dtype: str) -> int:
        """Return a value of the graph in the type float32 or int8, converted if it exists in another type only."""
        if (name, dtype) in self.index:
            return self.index[name, dtype]
        (source,) = (index for (known, _), index in self.index.items() if known == name)
        output = self._value(name, dtype)
        self._emit("QUANTIZE" if dtype == "int8" else "DEQUANTIZE", [source], output)
        return output

    def _emit(self, operator: str, inputs: list[int], output: int, options: str = "", **fields: Any) -> None:
        """Append an operator; `options` is the name of its table of `fields`."""
        types = {self.tensors[i].type for i in inputs}
        version = _INT8_VERSIONS.get(operator, 1) if schema.TensorType.INT8 in types else 1
        if operator == "DEQUANTIZE":
            version = 3 if schema.TensorType.FLOAT16 in types else 2 if schema.TensorType.INT8 in types else 1
        elif operator == "DEPTHWISE_CONV_2D" and fields["dilationHFactor"] > 1:
            version = max(version, 2)
        elif operator == "CONV_2D" and self.tensors[inputs[0]].shape[3] != self.tensors[inputs[1]].shape[3]:
            version = 6  # groups
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self.codes.setdefault((operator, version), len(self.codes)),
                inputs=_ints(*inputs),
                outputs=_ints(output),
                builtinOptionsType=getattr(schema.BuiltinOptions, options) if options else 0,
                builtinOptions=getattr(schema, f"{options}T")(**fields) if options else None,
            )
        )

    def _add_node(self, node: Node) -> None:
        dtype = "float32" if node.name in self.network.floats else "int8"
        inputs = [self._read(name, dtype) for name in node.inputs]
        if isinstance(node, Layer):
            self._add_layer(node, inputs[0], dtype)
            return
        output = self._value(node.name, dtype)
        match node:
            case Add():
                self._emit("ADD", inputs, output, "AddOptions", fusedActivationFunction=_FUSED[node.activation])
            case Multiply():
                self._emit("MUL", inputs, output, "MulOptions", fusedActivationFunction=_FUSED["linear"])
            case Mean():
                axes = self._constant(f"{node.name}/axes", _ints(1, 2))
                self._emit("MEAN", [*inputs, axes], output, "ReducerOptions", keepDims=len(node.shape) == 3)
            case AveragePairs():
                window = {"filterHeight": 2, "filterWidth": 2, "strideH": 2, "strideW": 2}
                padding = schema.Padding.VALID
                self._emit("AVERAGE_POOL_2D", inputs, output, "Pool2DOptions", padding=padding, **window)
            case Activate(function="hard_swish"):
                self._emit("HARD_SWISH", inputs, output, "HardSwishOptions")
            case Activate(function="gelu"):
                self._emit("GELU", inputs, output, "GeluOptions", approximate=False)
            case Activate(function="sigmoid"):
                self._emit("LOGISTIC", inputs, output)
            case Attend() if dtype == "float32":
                self._attend(node, inputs, output)
            case _:
                raise TypeError(f"TFLite has no {type(node).__name__} in {dtype}")

    def _add_layer(self, node: Layer, x: int, dtype: str) -> None:
        if isinstance(node, Dense):
            weights = self._weights(node, dtype, (1, 0))
            output, fused = self._value(node.name, dtype), _FUSED[node.activation]
            self._emit("FULLY_CONNECTED", [x, *weights], output, "FullyConnectedOptions", fusedActivationFunction=fused)
            return
        assert isinstance(node, Conv)
        x, padding = self._pad(node, x, dtype)
        fields = {
            "padding": padding,
            "strideH": node.stride,
            "strideW": node.stride,
            "dilationHFactor": node.dilation,
            "dilationWFactor": node.dilation,
            "fusedActivationFunction": _FUSED[node.activation],
        }
        if node.depthwise:  # the kernel is [1, height, width, channels]
            weights, output = self._weights(node, dtype, (2, 0, 1, 3)), self._value(node.name, dtype)
            options = "DepthwiseConv2DOptions"
            self._emit("DEPTHWISE_CONV_2D", [x, *weights], output, options, depthMultiplier=1, **fields)
        else:  # the kernel is [filters, height, width, channels of a group]
            weights, output = self._weights(node, dtype, (3, 0, 1, 2)), self._value(node.name, dtype)
            self._emit("CONV_2D", [x, *weights], output, "Conv2DOptions", **fields)

    def _pad(self, node: Conv, x: int, dtype: str) -> tuple[int, int]:
        """Return (input, padding): SAME if it gives the pads of the layer, otherwise VALID on a padded input."""
        height, width, channels = self.graph.shape(node.inputs[0])
        sides = zip((height, width), node.kernel_shape[:2], strict=True)
        if node.pads == tuple(pads(n, k, node.stride, node.dilation, "same") for n, k in sides):
            return x, schema.Padding.SAME
        (top, bottom), (left, right) = node.pads
        name, shape = f"{node.name}/pad", (height + top + bottom, width + left + right, channels)
        table = self._constant(f"{name}/sides", np.array([[0, 0], *node.pads, [0, 0]], np.int32))
        scale = None if dtype == "float32" else self.network.tensors[node.inputs[0]]
        padded = self._batched(name, shape, dtype, scale)
        self._emit("PAD", [x, table], padded, "PadOptions")
        return padded, schema.Padding.VALID

    def _weights(self, node: Layer, dtype: str, axes: tuple[int, ...]) -> tuple[int, int]:
        """Append kernel and bias; `axes` is the order of the kernel's axes in the file."""
        kernel_name, bias_name = f"{node.name}/kernel", f"{node.name}/bias"
        if dtype == "int8":
            layer = self.network.layers[node.name]
            filters = axes.index(len(axes) - 1)
            kernel_scale = _parameters(layer.kernel_scale, axis=filters if len(layer.kernel_scale) > 1 else 0)
            kernel = self._constant(kernel_name, layer.kernel.transpose(axes), kernel_scale)
            return kernel, self._constant(bias_name, layer.bias, _parameters(layer.bias_scale))
        weights = self.network.weights[node.name]
        kernel, bias = weights.kernel.transpose(axes), self._constant(bias_name, weights.bias)
        if not self.float16:
            return self._constant(kernel_name, kernel), bias
        widened = self._tensor(kernel_name, kernel.shape, "float32")
        self._emit("DEQUANTIZE", [self._constant(f"{kernel_name}/float16", kernel.astype(np.float16))], widened)
        return widened, bias

    def _attend(self, node: Attend, inputs: list[int], output: int) -> None:
        """Two matrix products: key and value belong to all heads, so the heads are more rows of the query."""
        height, width, channels = node.shape
        size, rows = channels // node.heads, height * width * node.heads
        pixels = math.prod(self.graph.shape(node.inputs[1])[:2])
        shapes = {"queries": (rows, size), "keys": (pixels, size), "values": (pixels, size)}
        queries, keys, values = (
            self._reshape(x, self._batched(f"{node.name}/{part}", shape, "float32", None))
            for x, (part, shape) in zip(inputs, shapes.items(), strict=True)
        )
        scores, shares = (
            self._batched(f"{node.name}/{part}", (rows, pixels), "float32", None) for part in ("scores", "shares")
        )
        attended = self._batched(f"{node.name}/rows", (rows, size), "float32", None)
        self._emit("BATCH_MATMUL", [queries, keys], scores, "BatchMatMulOptions", adjY=True)
        self._emit("SOFTMAX", [scores], shares, "SoftmaxOptions", beta=1.0)
        self._emit("BATCH_MATMUL", [shares, values], attended, "BatchMatMulOptions")
        self._reshape(attended, output)

    def _reshape(self, x: int, output: int) -> int:
        tensor = self.tensors[output]
        shape = _ints(-1 if self.batch is None else self.batch, *tensor.shape[1:])
        constant = self._constant(f"{tensor.name}/shape", shape)
        self._emit("RESHAPE", [x, constant], output, "ReshapeOptions", newShape=shape)
        return output


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _parameters(scale: np.ndarray, zero_point: int = 0, *, axis: int = 0) -> Any:
    zeros = np.full(scale.shape, zero_point, np.int64)
    return schema.QuantizationParametersT(scale=scale.astype(np.float32), zeroPoint=zeros, quantizedDimension=axis)


def _operator_code(operator: str, version: int) -> Any:
    code = getattr(schema.BuiltinOperator, operator)
    return schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version)
