"""PyTorch's files, zip and the older stream, without PyTorch and without unpickling.

The pickle inside is interpreted here, opcode by opcode: numbers, strings, containers, and the few names that stand for
a tensor. Any other opcode or name is refused before it means anything. Layout: torch/serialization.py of PyTorch 2.14.
"""

import io
import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mobilenet_jax.weights import WeightsError

_ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_ENTRIES_LIMIT = 20_000  # a MobileNet has some 1,500 tensors
_PICKLE_LIMIT = 8_000_000  # bytes; that of a MobileNet has 40,000

_STORAGES = {
    f"torch {name}Storage": np.dtype(dtype).newbyteorder("<")
    for name, dtype in (
        ("Float", np.float32),
        ("Half", np.float16),
        ("Double", np.float64),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Long", np.int64),
        ("Int", np.int32),
    )
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = (_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES)


@dataclass(frozen=True)
class _Name:
    """A global of the pickle, of `_NAMES`: never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, elements: np.ndarray) -> np.ndarray:
        """The tensor inside its storage; nothing is copied, and nothing outside can be seen."""
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) > elements.size or (last >= elements.size and 0 not in self.shape):
            raise WeightsError(f"a tensor of shape {list(self.shape)} reaches beyond its {elements.size} elements")
        strides = [stride * elements.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides, writeable=False)


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name.

    Raises WeightsError for a file of another kind, for what is no tensor, and for anything that would be executed.
    """
    data = path.read_bytes()
    if data.startswith(_ZIP_MAGIC):
        tensors, storages = _read_zip(data)
    else:
        tensors, storages = _read_stream(io.BytesIO(data))
    if not isinstance(tensors, dict):
        raise WeightsError("it holds no state dict")
    if wrong := [name for name, tensor in tensors.items() if not isinstance(tensor, _Tensor)]:
        raise WeightsError(f"its entry {wrong[0]!r} is no tensor; valid: a state dict, model.state_dict()")
    return {name: tensor.view(storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_zip(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    if data.count(b"PK\x01\x02") > _ENTRIES_LIMIT:  # before `zipfile` makes an object of each
        raise WeightsError(f"its zip directory has more than {_ENTRIES_LIMIT:,} entries")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise WeightsError("it is a zip file without PyTorch's data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        infos = {info.filename: info for info in archive.infolist()}

        def read(name: str) -> bytes:
            info = infos[root + name]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise WeightsError(f"its part {name} is compressed or larger than the file")
            return archive.read(info)

        if root + "byteorder" in infos and read("byteorder") != b"little":
            raise WeightsError("its numbers are big-endian; valid: little-endian")
        interpreter = _Interpreter()
        tensors = interpreter.run(io.BytesIO(read("data.pkl")))
        storages = {}
        for key, storage in interpreter.storages.items():
            if f"{root}data/{key}" not in infos:
                raise WeightsError(f"its storage {key!r} is not there")
            storages[key] = np.frombuffer(read(f"data/{key}"), storage.dtype)
        return tensors, storages


def _read_stream(stream: io.BytesIO) -> tuple[Any, dict[str, np.ndarray]]:
    interpreter = _Interpreter()
    if interpreter.run(stream) != _STREAM_MAGIC:
        raise WeightsError("it is no file of torch.save")
    if interpreter.run(stream) != _STREAM_VERSION:
        raise WeightsError(f"it is of another version than {_STREAM_VERSION}")
    system = interpreter.run(stream)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("its numbers are big-endian; valid: little-endian")
    tensors = interpreter.run(stream)
    keys = interpreter.run(stream)
    if not isinstance(keys, list) or {str(key) for key in keys} != interpreter.storages.keys():
        raise WeightsError("its list of storages is not that of its tensors")
    buffer, storages = stream.getbuffer(), {}
    for key in keys:
        storage, start = interpreter.storages[key], stream.tell()
        count, size = int.from_bytes(buffer[start : start + 8], "little"), storage.dtype.itemsize
        if count > (len(buffer) - start - 8) // size:
            raise WeightsError(f"its storage {key!r} of {count} elements is cut off")
        storages[key] = np.frombuffer(buffer, storage.dtype, count, start + 8)
        stream.seek(start + 8 + count * size)
    return tensors, storages


class _Interpreter:
    """A stack machine for the opcodes that describe tensors."""

    def __init__(self):
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The value of one pickle; the stream is left behind it."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        start = stream.tell()

        def pop_to_mark() -> list[Any]:
            mark = marks.pop()
            values = stack[mark:]
            del stack[mark:]
            return values

        for opcode, argument, position in pickletools.genops(stream):
            if (position or 0) - start > _PICKLE_LIMIT:
                raise WeightsError(f"its pickle is longer than {_PICKLE_LIMIT:,} bytes")
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[opcode.name])
                case "TUPLE":
                    stack.append(tuple(pop_to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "APPEND" | "APPENDS":
                    items = pop_to_mark() if opcode.name == "APPENDS" else [stack.pop()]
                    _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop_to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    keys = [_expect(key, str) for key in items[::2]]
                    _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]  # pyright: ignore[reportArgumentType]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])  # pyright: ignore[reportArgumentType]
                case "GLOBAL":
                    if argument not in _NAMES:
                        raise WeightsError(f"its pickle names {argument!r}, no part of a tensor; nothing was run")
                    stack.append(_Name(str(argument)))
                case "BINPERSID":
                    stack.append(self._refer(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_apply(stack.pop(), arguments))
                case "BUILD":
                    stack.pop()  # a state dict's `_metadata`: versions of modules
                    _expect(stack[-1], dict)
                case name:
                    raise WeightsError(f"its pickle has the opcode {name}, which no tensor needs; nothing was run")
        raise WeightsError("its pickle has no end")

    def _refer(self, reference: Any) -> _Storage:
        """The storage that ("storage", type, key, device, elements, ...) refers to."""
        _, kind, key, _, size, *_ = _expect(reference, tuple)
        if not isinstance(kind, _Name) or kind.name not in _STORAGES:
            raise WeightsError("its pickle refers to something that is no storage")
        storage = _Storage(_expect(key, str), _STORAGES[kind.name], _expect(size, int))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {key!r} is of two kinds")
        return storage


def _apply(function: Any, arguments: Any) -> Any:
    """What a call in the pickle stands for: an empty dict, a tensor, or the tensor of a parameter."""
    match function, arguments:
        case _Name(name), () if name == _ORDERED_DICT:
            return {}
        case _Name(name), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if name == _TENSOR:
            if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
                raise WeightsError(f"it has a tensor of shape {shape} with strides {strides}")
            return _Tensor(storage, offset, shape, strides)
        case _Name(name), (_Tensor() as tensor, *_) if name == _PARAMETER:
            return tensor
    raise WeightsError("its pickle calls something that makes no tensor; nothing was run")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise WeightsError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
