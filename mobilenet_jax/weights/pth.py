"""PyTorch's files, the zip and the older stream, read without PyTorch. Nothing in them can be imported or executed.

`pickle.Unpickler` reads the pickle inside, under rules that leave it nothing to run and bound its time and memory. Each
opcode must be one that a state dict needs. Each name must be one that describes a tensor, and becomes a placeholder of
ours. A value that the pickle refers to again must not be a tuple, because hashing tuples that share tuples takes
exponential time. Layout of the files: torch/serialization.py of PyTorch 2.14.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mobilenet_jax.weights import WeightsError

_ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_ENTRIES_LIMIT = 20_000  # the zip of a MobileNet has about 1,500
_PICKLE_LIMIT = 500_000  # bytes, and entries of its memo; the pickle of a MobileNet has 40,000 to 200,000 bytes
_AXES_LIMIT = 8

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

_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
# Each leaves text, a list, a dict or a placeholder on the stack.
_SHAREABLE = ("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "REDUCE", "EMPTY_DICT", "EMPTY_LIST")
_OPCODES = {
    *(*_SHAREABLE, *_PUTS, *_GETS, "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPERSID", "BUILD"),
}


# Placeholders are tuples because the opcode BUILD can change the attributes of most other objects.


class _Storage(NamedTuple):
    """A run of numbers that tensors are cut from."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A tensor's place in its storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, elements: np.ndarray) -> np.ndarray:
        """Return a read-only view of the storage's elements; raise WeightsError if it reaches beyond them."""
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) > elements.size or (last >= elements.size and 0 not in self.shape):
            raise WeightsError(f"a tensor of shape {list(self.shape)} reaches beyond its {elements.size} elements")
        strides = [stride * elements.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides, writeable=False)


class _StateDict(dict):
    """The placeholder of an OrderedDict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore `_metadata`, the versions of modules."""


class _Name(NamedTuple):
    """The placeholder of a class or function, one of `_NAMES`, which is never imported."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        """Return the placeholder of the call's result: an empty dict, a tensor, or the tensor of a parameter."""
        match self.name, arguments:
            case name, () if name == _ORDERED_DICT:
                return _StateDict()
            case name, (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if name == _TENSOR:
                if not len(shape) == len(strides) <= _AXES_LIMIT:
                    raise WeightsError(f"it has a tensor of {len(shape)} axes with {len(strides)} strides")
                if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
                    raise WeightsError("it has a tensor whose offset, shape or strides are not integers of at least 0")
                return _Tensor(storage, offset, shape, strides)
            case name, (_Tensor() as tensor, *_) if name == _PARAMETER:
                return tensor
        raise WeightsError("its pickle calls something that makes no tensor; nothing was run")


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows placeholders only, and collects the storages that the pickle refers to."""

    def __init__(self, pickled: bytes, storages: dict[str, _Storage]):
        super().__init__(io.BytesIO(pickled))
        self._storages = storages

    def find_class(self, module_name: str, global_name: str) -> _Name:
        name = f"{module_name} {global_name}"
        if name not in _NAMES:
            raise WeightsError(f"its pickle names {name!r}, no part of a tensor; nothing was run")
        return _Name(name)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that ("storage", type, key, device, elements, ...) refers to."""
        _, kind, key, _, size, *_ = _expect(pid, tuple)
        if not isinstance(kind, _Name) or kind.name not in _STORAGES:
            raise WeightsError("its pickle refers to something that is no storage")
        storage = _Storage(_expect(key, str), _STORAGES[kind.name], _expect(size, int))
        if self._storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {key!r} has two types or sizes")
        return storage


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict, by name.

    Raises WeightsError for a file of another kind, for an entry that is no tensor, and for a pickle that would import
    or call anything else.
    """
    data = path.read_bytes()
    if data.startswith(_ZIP_MAGIC):
        tensors, storages = _read_zip(data)
    else:
        tensors, storages = _read_stream(io.BytesIO(data))
    if not isinstance(tensors, dict):
        raise WeightsError("it holds no state dict")
    for name, tensor in tensors.items():
        if not isinstance(tensor, _Tensor):
            raise WeightsError(
                f"its entry {_expect(name, str)!r} is no tensor; valid: a state dict, model.state_dict()"
            )
    return {_expect(name, str): tensor.view(storages[tensor.storage.key]) for name, tensor in tensors.items()}


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
        described: dict[str, _Storage] = {}
        tensors = _read_pickle(io.BytesIO(read("data.pkl")), described)
        storages = {}
        for key, storage in described.items():
            if f"{root}data/{key}" not in infos:
                raise WeightsError(f"its storage {key!r} is missing")
            storages[key] = np.frombuffer(read(f"data/{key}"), storage.dtype)
        return tensors, storages


def _read_stream(stream: io.BytesIO) -> tuple[Any, dict[str, np.ndarray]]:
    described: dict[str, _Storage] = {}
    if _read_pickle(stream, described) != _STREAM_MAGIC:
        raise WeightsError("it is no file of torch.save")
    if _read_pickle(stream, described) != _STREAM_VERSION:
        raise WeightsError(f"it is of another version than {_STREAM_VERSION}")
    system = _read_pickle(stream, described)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise WeightsError("its numbers are big-endian; valid: little-endian")
    tensors = _read_pickle(stream, described)
    keys = _read_pickle(stream, described)
    if not isinstance(keys, list) or {_expect(key, str) for key in keys} != described.keys():
        raise WeightsError("its list of storages does not match its tensors")
    buffer, storages = stream.getbuffer(), {}
    for key in keys:
        storage, start = described[key], stream.tell()
        count, size = int.from_bytes(buffer[start : start + 8], "little"), storage.dtype.itemsize
        if count > (len(buffer) - start - 8) // size:
            raise WeightsError(f"its storage {key!r} of {count} elements is cut off")
        storages[key] = np.frombuffer(buffer, storage.dtype, count, start + 8)
        stream.seek(start + 8 + count * size)
    return tensors, storages


def _read_pickle(stream: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """Return the value of one pickle, and leave the stream at its end; add the storages that it refers to."""
    start, last, shareable = stream.tell(), "", set()
    for opcode, argument, position in pickletools.genops(stream):
        if (position or 0) - start > _PICKLE_LIMIT:
            raise WeightsError(f"its pickle is longer than {_PICKLE_LIMIT:,} bytes")
        if opcode.name not in _OPCODES or (opcode.name == "LONG1" and argument != _STREAM_MAGIC):
            raise WeightsError(f"its pickle has the opcode {opcode.name}, which no tensor needs; nothing was run")
        if opcode.name in _PUTS:
            if int(argument or 0) > _PICKLE_LIMIT:  # the memo is an array
                raise WeightsError(f"its pickle remembers more than {_PICKLE_LIMIT:,} values")
            (shareable.add if last in _SHAREABLE else shareable.discard)(argument)
            continue
        if opcode.name in _GETS and argument not in shareable:
            raise WeightsError("its pickle refers to a tuple again, which no tensor needs; nothing was run")
        last = "GLOBAL" if opcode.name in _GETS else opcode.name
    return _Unpickler(stream.getvalue()[start : stream.tell()], storages).load()


def _expect(value: Any, kind: type) -> Any:
    """Return the value; raise WeightsError if it is of another type."""
    if not isinstance(value, kind):
        raise WeightsError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
