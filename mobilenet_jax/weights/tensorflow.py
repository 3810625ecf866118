"""TensorFlow's variables without TensorFlow: those in a frozen GraphDef, and those of an .npz.

A GraphDef is a protocol buffer. Only the fields that lead to constants are read; their numbers are from tensorflow's
core/framework/graph.proto, node_def.proto, attr_value.proto, tensor.proto and tensor_shape.proto.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.pth import open_zip

_NODES_LIMIT = 200_000  # a frozen MobileNet has about 1,000
_FIELDS_LIMIT = 2_000_000
_ELEMENTS_LIMIT = 1 << 24  # of a variable; the largest of a MobileNet has 3,000,000
_FLOAT, _HALF = 1, 19  # tensorflow's DataType
_AVERAGES = "ExponentialMovingAverage"
# The last part of the names of what a network needs. The optimizer's variables have a part more.
_VARIABLES = {"weights", "depthwise_weights", "biases", "gamma", "beta", "moving_mean", "moving_variance"}


class _Message:
    """The fields of a protocol buffer's message, read once, with a bound on their number in the whole file."""

    def __init__(self, data: memoryview, budget: list[int]):
        self._data, self._budget = data, budget

    def fields(self) -> Iterator[tuple[int, Any]]:
        """Yield (number, value): an integer, or the bytes of text, a message, or packed numbers."""
        place, data = 0, self._data
        while place < len(data):
            self._budget[0] -= 1
            if self._budget[0] < 0:
                raise WeightsError(f"its graph has more than {_FIELDS_LIMIT:,} fields")
            tag, place = self._varint(place)
            kind = tag & 7
            if kind == 0:
                value, place = self._varint(place)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
                value, place = data[place : place + size], place + size
            elif kind == 2:
                size, place = self._varint(place)
                value, place = data[place : place + size], place + size
            else:
                raise WeightsError("it is no protocol buffer")
            if place > len(data):
                raise WeightsError("its graph is cut off")
            yield tag >> 3, value

    def _varint(self, place: int) -> tuple[int, int]:
        value = 0
        for i, byte in enumerate(self._data[place : place + 10]):
            value |= (byte & 127) << (7 * i)
            if byte < 128:
                return value, place + i + 1
        raise WeightsError("its graph is cut off, or it is no protocol buffer")

    def message(self, value: memoryview) -> "_Message":
        """Return the message in a field."""
        if not isinstance(value, memoryview):
            raise WeightsError("it is no graph of TensorFlow")
        return _Message(value, self._budget)


def read_graph(data: bytes) -> dict[str, Any]:
    """Return the variables of a frozen GraphDef, as `split_averages` does.

    Raises WeightsError for a file of another kind, and for a graph whose weights are quantised.
    """
    graph = _Message(memoryview(data), [_FIELDS_LIMIT])
    variables, names = {}, []
    for number, value in graph.fields():
        if number != 1:  # versions, library
            continue
        name, kind, tensor = _read_node(graph.message(value))
        names.append(name)
        if len(names) > _NODES_LIMIT:
            raise WeightsError(f"its graph has more than {_NODES_LIMIT:,} nodes")
        if kind == "Const" and tensor is not None and _is_variable(name):
            variables[name] = _read_tensor(graph.message(tensor), name)
    if not variables:
        what = "no nodes" if not names else f"no constants that are weights; its nodes: {', '.join(names[:3])}"
        raise WeightsError(f"it is no frozen graph of TensorFlow: it has {what}")
    return split_averages(variables)


def _read_node(node: _Message) -> tuple[str, str, memoryview | None]:
    """Return (name, operation, the tensor of its attribute "value") of a NodeDef."""
    name, kind, tensor = "", "", None
    for number, value in node.fields():
        if number in (1, 2) and isinstance(value, memoryview):
            text = bytes(value[:1000]).decode(errors="replace")
            name, kind = (text, kind) if number == 1 else (name, text)
        elif number == 5:
            entry = dict(node.message(value).fields())
            if bytes(entry.get(1, b"")) == b"value" and isinstance(entry.get(2), memoryview):
                tensor = dict(node.message(entry[2]).fields()).get(8)
    return name, kind, tensor


def _read_tensor(tensor: _Message, name: str) -> np.ndarray:
    kind, shape, content, numbers = 0, [], None, []
    for number, value in tensor.fields():
        if number == 1:
            kind = value
        elif number == 2:
            dims = [tensor.message(dim) for field, dim in tensor.message(value).fields() if field == 2]
            shape = [int(dict(dim.fields()).get(1, 0)) for dim in dims]
        elif number == 4:
            content = bytes(value)
        elif number == 5:  # packed, or one number a field
            numbers.append(bytes(value))
    if kind not in (_FLOAT, _HALF):
        raise WeightsError(f"its variable {name} has the data type {kind}, perhaps quantised; valid: float32, float16")
    if len(shape) > 8:
        raise WeightsError(f"its variable {name} has {len(shape)} axes")
    values = np.frombuffer(content or b"".join(numbers), "<f2" if kind == _HALF and content else "<f4")
    count = math.prod(shape)
    if count > _ELEMENTS_LIMIT:
        raise WeightsError(f"its variable {name} of shape {shape} is larger than any of a MobileNet")
    if values.size == 1 < count:  # one number stands for all, here too: a view takes no memory
        return np.broadcast_to(values, shape)
    if values.size != count:
        raise WeightsError(f"its variable {name} of shape {shape} has {values.size} numbers")
    return values.reshape(shape)


def _is_variable(name: str) -> bool:
    return name.removesuffix(f"/{_AVERAGES}").rpartition("/")[2] in _VARIABLES


def read_npz(path: Path, *, limit: int) -> dict[str, Any]:
    """Return the arrays of an .npz, at most `limit` bytes; a TensorFlow model's as `split_averages` does.

    Raises WeightsError for arrays of objects, and for sizes that the file does not have.
    """
    arrays, left = {}, limit
    with path.open("rb") as file, open_zip(file, limit=2 * limit) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            left -= info.file_size
            if left < 0:
                raise WeightsError(f"its arrays have more than {limit:,} bytes")
            with archive.open(info) as part:
                version = np.lib.format.read_magic(part)
                if version not in ((1, 0), (2, 0)):
                    raise WeightsError(f"its array {name} is of the unknown version {version}")
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, is_fortran, dtype = read(part)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize > info.file_size:
                    raise WeightsError(
                        f"its array {name} of shape {list(shape)} is larger than the file, or of objects"
                    )
                values = np.frombuffer(part.read(math.prod(shape) * dtype.itemsize), dtype)
                arrays[name] = values.reshape(shape, order="F" if is_fortran else "C")
    if any("Mobilenet" in name for name in arrays):
        return split_averages({name: values for name, values in arrays.items() if _is_variable(name)})
    return arrays


def split_averages(variables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the variables, or {"variables": ..., "ExponentialMovingAverage": ...} if there are averages of them."""
    ending = f"/{_AVERAGES}"
    plain = {name: values for name, values in variables.items() if not name.endswith(ending)}
    averages = {name.removesuffix(ending): v for name, v in variables.items() if name.endswith(ending)}
    return {"variables": plain, _AVERAGES: {**plain, **averages}} if averages else plain
