"""PyTorch's files, the zip and the older stream, read without PyTorch. Nothing in them can be imported or executed.

`pickle.Unpickler` reads the pickle inside, under rules that leave it nothing to run and bound its time and memory:
  - each opcode is one of a list, and there are at most 300,000 of them;
  - a name becomes a placeholder of ours: a tensor's parts, or an `Opaque` object that does nothing;
  - a tuple is no key, because hashing tuples that share tuples takes exponential time.
Layout of the files: torch/serialization.py of PyTorch 2.14.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mobilenet_jax.weights import WeightsError

ZIP_MAGIC = b"PK\x03\x04"
BYTES_LIMIT = 2_000_000_000  # of a file: a checkpoint of the largest MobileNet with averages and optimizer has 700 MB
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001
_DIRECTORY_LIMIT = 8_000_000  # bytes read to find the entries of a zip; a checkpoint has 5,000 entries of 80 bytes
_PICKLE_LIMIT = 16_000_000  # bytes; the pickle of a MobileNet has 40,000 to 200,000, with the optimizer up to 2,000,000
_OPCODES_LIMIT = 300_000  # and entries of the memo; a tensor takes about 35 opcodes, a checkpoint has 4,000 tensors
_NAMES_LIMIT = 1_000  # classes and functions
_TENSORS_LIMIT = 320_000_000  # bytes of the chosen tensors; the largest MobileNet has 151 MB in float32
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
        ("Short", np.int16),
        ("Char", np.int8),
        ("Byte", np.uint8),
        ("Bool", np.bool_),
    )
}
_ORDERED_DICT = "collections OrderedDict"
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
_FROM_TYPE = "torch._tensor _rebuild_from_type_v2"
_NAMES = (_ORDERED_DICT, *_TENSORS, *_PARAMETERS, _FROM_TYPE, *_STORAGES)
# No checkpoint needs these, and attacks use them. Other names are as harmless, because nothing is ever called.
_EXECUTING_MODULES = {
    *("os", "posix", "nt", "subprocess", "commands", "sys", "pty", "shutil", "socket", "ctypes", "importlib", "runpy"),
    *("code", "codeop", "pickle", "_pickle", "cPickle", "marshal", "webbrowser", "pdb", "bdb", "timeit", "cProfile"),
}
_EXECUTING_BUILTINS = {"eval", "exec", "execfile", "compile", "__import__", "open", "input", "breakpoint"}

_PUTS, _GETS = ("BINPUT", "LONG_BINPUT", "MEMOIZE"), ("BINGET", "LONG_BINGET")
_DEEP = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")  # their hash goes through all they hold
_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_OPCODES = {
    *(*_PUTS, *_GETS, *_DEEP, *_IN_PLACE, "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "BINPERSID"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX"),
}


class Opaque:
    """The placeholder of an object that is no tensor. It takes what a pickle gives it and does nothing.

    It keeps a state that is a dict, because the state of a whole model has the tensors.
    """

    __slots__ = ("state",)

    def __new__(cls, *arguments: Any, **options: Any) -> "Opaque":
        """Return the placeholder, whatever the arguments."""
        self = object.__new__(cls)
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        """Keep a dict."""
        self.state = state if isinstance(state, dict) else None

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item."""

    def append(self, item: Any) -> None:
        """Ignore an item."""

    add = extend = append


# The other placeholders are tuples because the opcode BUILD can change the attributes of most other objects.


class _Storage(NamedTuple):
    """A run of numbers that tensors are cut from."""

    key: str
    dtype: np.dtype
    size: int


class Tensor(NamedTuple):
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
            case name, (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_) if name in _TENSORS:
                if not len(shape) == len(strides) <= _AXES_LIMIT:
                    raise WeightsError(f"it has a tensor of {len(shape)} axes with {len(strides)} strides")
                if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
                    raise WeightsError("it has a tensor whose offset, shape or strides are not integers of at least 0")
                return Tensor(storage, offset, shape, strides)
            case name, (Tensor() as tensor, *_) if name in _PARAMETERS:
                return tensor
            case name, (_Name() as rebuild, _, tuple(inner), *_) if name == _FROM_TYPE and rebuild.name != _FROM_TYPE:
                return rebuild(*inner)
            case name, (Opaque(), *_) if name in (*_TENSORS, *_PARAMETERS):  # of numbers that no MobileNet has
                return Opaque()
        raise WeightsError("its pickle calls something that makes no tensor; nothing was run")


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows placeholders only, and collects the storages that the pickle refers to."""

    def __init__(self, pickled: bytes, storages: dict[str, _Storage]):
        super().__init__(io.BytesIO(pickled))
        self._storages = storages
        self._classes: dict[str, type[Opaque]] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name} {global_name}"
        if name in _NAMES:
            return _Name(name)
        is_builtin = module_name in ("builtins", "__builtin__") and global_name in _EXECUTING_BUILTINS
        if is_builtin or module_name.split(".")[0] in _EXECUTING_MODULES:
            raise WeightsError(f"its pickle names {name!r}, which would run code; nothing was run")
        if len(self._classes) >= _NAMES_LIMIT:
            raise WeightsError(f"its pickle names more than {_NAMES_LIMIT:,} classes and functions")
        return self._classes.setdefault(name, type("Opaque", (Opaque,), {"__slots__": ()}))

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that ("storage", type, key, device, elements, ...) refers to.

        Old files refer to a model's class by ("module", class, ...).
        """
        what, kind, *rest = _expect(pid, tuple)
        if what == "module" and isinstance(kind, type) and issubclass(kind, Opaque):
            return kind
        key, _, size, *_ = rest
        if isinstance(kind, type) and issubclass(kind, Opaque):  # complex or quantised numbers
            return Opaque()
        if not isinstance(kind, _Name) or kind.name not in _STORAGES:
            raise WeightsError("its pickle refers to something that is no storage")
        storage = _Storage(_expect(key, str), _STORAGES[kind.name], _expect(size, int))
        if self._storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"its storage {key!r} has two types or sizes")
        return storage


class _Limited:
    """A file that gives at most `left` more bytes."""

    def __init__(self, file: BinaryIO, left: int, what: str):
        self._file, self.left, self._what = file, left, what

    def _take(self, read: Any, size: int) -> bytes:
        data = read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0 or size > self.left + len(data):
            raise WeightsError(f"its {self._what} is longer than any of a MobileNet")
        return data

    def read(self, size: int = -1) -> bytes:
        """Return bytes; raise WeightsError if more are asked for than are left."""
        return self._take(self._file.read, size)

    def readline(self) -> bytes:
        """Return a line; raise WeightsError if it is longer than what is left."""
        return self._take(self._file.readline, -1)


class _Recorder(_Limited):
    """A limited file that keeps what it gave."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, _PICKLE_LIMIT, "pickle")
        self.given = bytearray()

    def _take(self, read: Any, size: int) -> bytes:
        data = super()._take(read, size)
        self.given += data
        return data


class _ZipDirectory(_Limited):
    """A file of which `zipfile` may read the list of entries, and no more than that is possible to list."""

    def seek(self, *place: int) -> int:
        """Move as a file does."""
        return self._file.seek(*place)

    def tell(self) -> int:
        """Return the place as a file does."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Return True, as a file does."""
        return True


def open_zip(file: BinaryIO, *, limit: int) -> zipfile.ZipFile:
    """Return the archive of a zip file; its list of entries and then its parts are limited, the latter to `limit`.

    Raises WeightsError for a list of entries that is longer than that of any weights.
    """
    limited = _ZipDirectory(file, _DIRECTORY_LIMIT, "list of entries")
    archive = zipfile.ZipFile(limited)  # pyright: ignore[reportArgumentType, reportCallIssue]
    limited.left, limited._what = limit, "content"
    return archive


class PthFile:
    """A file of torch.save: `content` is its value, with a `Tensor` for each tensor and `Opaque` for other objects."""

    def __init__(self, path: Path):
        """Read the description of the tensors, not their numbers; raise WeightsError for a file of another kind."""
        self._path = path
        self._storages: dict[str, _Storage] = {}
        self._starts: dict[str, int] = {}  # of the older stream: where each storage's numbers begin
        self._root = ""  # of a zip
        with path.open("rb") as file:
            self._is_zip = file.read(4) == ZIP_MAGIC
            file.seek(0)
            self.content = self._read_zip(file) if self._is_zip else self._read_stream(file, path.stat().st_size)

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return the numbers of tensors; raise WeightsError if they are missing, or more than a MobileNet has."""
        needed = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        size = sum(storage.size * storage.dtype.itemsize for storage in needed.values())
        if not 0 <= size <= _TENSORS_LIMIT:
            raise WeightsError(f"its tensors have {size:,} bytes; no MobileNet has more than {_TENSORS_LIMIT:,}")
        elements = {}
        with self._path.open("rb") as file:
            if self._is_zip:
                with open_zip(file, limit=2 * _TENSORS_LIMIT) as archive:
                    infos = {info.filename: info for info in archive.infolist()}
                    for key, storage in needed.items():
                        data = self._read_part(archive, infos, f"data/{key}", _TENSORS_LIMIT)
                        elements[key] = np.frombuffer(data, storage.dtype)
            else:
                for key, storage in needed.items():
                    file.seek(self._starts[key])
                    elements[key] = np.frombuffer(file.read(storage.size * storage.dtype.itemsize), storage.dtype)
        return {name: tensor.view(elements[tensor.storage.key]) for name, tensor in tensors.items()}

    def _read_part(self, archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], part: str, limit: int) -> bytes:
        info = infos.get(self._root + part)
        if info is None:
            raise WeightsError(f"its part {part} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._path.stat().st_size:
            raise WeightsError(f"its part {part} is compressed or larger than the file")
        if info.file_size > limit:
            raise WeightsError(f"its part {part} of {info.file_size:,} bytes is larger than that of any MobileNet")
        return archive.read(info)

    def _read_zip(self, file: BinaryIO) -> Any:
        with open_zip(file, limit=2 * _PICKLE_LIMIT) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in infos if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise WeightsError("it is a zip file without PyTorch's data.pkl")
            self._root = pickles[0].removesuffix("data.pkl")
            has_order = self._root + "byteorder" in infos
            if has_order and self._read_part(archive, infos, "byteorder", 16) != b"little":
                raise WeightsError("its numbers are big-endian; valid: little-endian")
            pickled = self._read_part(archive, infos, "data.pkl", _PICKLE_LIMIT)
        return _read_pickle(io.BytesIO(pickled), self._storages)

    def _read_stream(self, stream: BinaryIO, size: int) -> Any:
        described = self._storages
        if _read_pickle(stream, described) != _STREAM_MAGIC:
            raise WeightsError("it is no file of torch.save")
        if _read_pickle(stream, described) != _STREAM_VERSION:
            raise WeightsError(f"it is of another version than {_STREAM_VERSION}")
        system = _read_pickle(stream, described)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise WeightsError("its numbers are big-endian; valid: little-endian")
        content = _read_pickle(stream, described)
        keys = _read_pickle(stream, described)
        if not isinstance(keys, list) or {_expect(key, str) for key in keys} != described.keys():
            raise WeightsError("its list of storages does not match its tensors")
        for key in keys:
            storage = described[key]
            count = int.from_bytes(stream.read(8), "little")
            start = self._starts[key] = stream.tell()
            if count > (size - start) // storage.dtype.itemsize or count != storage.size:
                raise WeightsError(f"its storage {key!r} of {count} elements is cut off")
            stream.seek(start + count * storage.dtype.itemsize)
        return content


def _read_pickle(stream: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """Return the value of one pickle, and leave the stream at its end; add the storages that it refers to."""
    recorder = _Recorder(stream)
    stack: list[bool] = []  # what the unpickler's stack will hold: true for a tuple
    marks, memo = [], {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(recorder)):  # pyright: ignore[reportArgumentType]
        name = opcode.name
        if name not in _OPCODES or (name == "LONG1" and argument != _STREAM_MAGIC and abs(argument or 0) >= 1 << 63):
            raise WeightsError(f"its pickle has the opcode {name}, which no tensor needs; nothing was run")
        if count > _OPCODES_LIMIT:
            raise WeightsError(f"its pickle has more than {_OPCODES_LIMIT:,} opcodes")
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            place = len(memo) if argument is None else argument
            if place > _OPCODES_LIMIT:  # the memo is an array
                raise WeightsError(f"its pickle remembers more than {_OPCODES_LIMIT:,} values")
            memo[place] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        else:
            _follow(name, stack, marks)
    return _Unpickler(bytes(recorder.given), storages).load()


# Which of the values that an opcode takes become keys.
_KEYS = {"SETITEM": slice(1, 2), "SETITEMS": slice(1, None, 2), "ADDITEMS": slice(1, None), "FROZENSET": slice(None)}
# {opcode: (whether it takes all down to a mark, how many values it takes besides, whether it leaves one)}
_EFFECTS = {
    opcode.name: (
        pickletools.markobject in opcode.stack_before,
        [*opcode.stack_before, pickletools.markobject].index(pickletools.markobject),
        bool(opcode.stack_after),
    )
    for opcode in pickletools.opcodes
}


def _follow(name: str, stack: list[bool], marks: list[int]) -> None:
    """Do to the stack what the opcode will do to the unpickler's; raise WeightsError if a tuple becomes a key."""
    marked, depth, leaves = _EFFECTS[name]
    start = (marks.pop() if marked else len(stack)) - depth
    if start < 0:
        raise WeightsError("its pickle takes more values than it has")
    taken = stack[start:]
    del stack[start:]
    if True in taken and any(taken[_KEYS.get(name, slice(0))]):
        raise WeightsError("its pickle has a tuple as a key, which no tensor needs; nothing was run")
    if leaves:
        stack.append(taken[0] if name in _IN_PLACE else name in _DEEP)


def _expect(value: Any, kind: type) -> Any:
    """Return the value; raise WeightsError if it is of another type."""
    if not isinstance(value, kind):
        raise WeightsError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
