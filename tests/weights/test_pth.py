import datetime
import io
import os
import pickle
import resource
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.load import read_tensors
from mobilenet_jax.weights.pth import Opaque, PthFile
from mobilenet_jax.weights.save import _pickle_integers, _pickle_string, _to_pth


def read_pth(path) -> dict[str, np.ndarray]:
    file = PthFile(path)
    return file.load(file.content)


def write_zip(
    path,
    pickled: bytes,
    *,
    storages: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
    byteorder: str = "little",
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("w/data.pkl", pickled)
        for key, data in {**{f"data/{k}": v for k, v in (storages or {}).items()}, "byteorder": byteorder}.items():
            archive.writestr(f"w/{key}", data)


def describe(
    name: str, shape, strides, *, offset: int = 0, size: int = 12, kind: str = "Float", key: str = "0"
) -> bytes:
    """The pickle's entry of a tensor."""
    return (
        _pickle_string(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + _pickle_string("storage")
        + f"ctorch\n{kind}Storage\n".encode()
        + _pickle_string(key)
        + _pickle_string("cpu")
        + _pickle_integers(size)
        + b"tQ"
        + _pickle_integers(offset)
        + b"("
        + _pickle_integers(*shape)
        + b"t("
        + _pickle_integers(*strides)
        + b"t\x89ccollections\nOrderedDict\n)RtR"
    )


def dictionary(*entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(entries) + b"u."


ELEMENTS = np.arange(12, dtype=np.float32)


def test_views_are_those_that_shape_and_strides_say(tmp_path):
    entries = (
        describe("rows", (3, 4), (4, 1)),
        describe("columns", (4, 3), (1, 4)),
        describe("part", (2,), (1,), offset=10),
        describe("scalar", (), (), offset=5),
        describe("empty", (0, 4), (4, 1)),
    )
    write_zip(tmp_path / "w.pth", dictionary(*entries), storages={"0": ELEMENTS.tobytes()})
    tensors = read_pth(tmp_path / "w.pth")
    np.testing.assert_array_equal(tensors["rows"], ELEMENTS.reshape(3, 4))
    np.testing.assert_array_equal(tensors["columns"], ELEMENTS.reshape(3, 4).T)
    np.testing.assert_array_equal(tensors["part"], [10, 11])
    assert tensors["scalar"] == 5
    assert tensors["empty"].shape == (0, 4)


def test_types_of_storages(tmp_path):
    for kind, dtype in (
        ("Half", np.float16),
        ("Double", np.float64),
        ("Long", np.int64),
        ("BFloat16", ml_dtypes.bfloat16),
    ):
        values = np.arange(3).astype(dtype)
        write_zip(
            tmp_path / "w.pth",
            dictionary(describe("w", (3,), (1,), size=3, kind=kind)),
            storages={"0": values.tobytes()},
        )
        found = read_pth(tmp_path / "w.pth")["w"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)


def test_what_our_writer_writes_is_read_back():
    tensors = {"a.weight": ELEMENTS.reshape(3, 4), "a.num_batches_tracked": np.zeros((), np.int64), "b": ELEMENTS[:1]}
    path = io.BytesIO(_to_pth(tensors))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((13,), (1,), 0), ((3, 4), (4, 2), 0), ((2,), (1,), 11), ((1 << 30,), (0,), 0), ((2, 1 << 30), (0, 0), 0)],
)
def test_a_tensor_never_reaches_beyond_its_storage(tmp_path, shape, strides, offset):
    write_zip(
        tmp_path / "w.pth", dictionary(describe("w", shape, strides, offset=offset)), storages={"0": ELEMENTS.tobytes()}
    )
    with pytest.raises(WeightsError, match="reaches beyond its 12 elements"):
        read_pth(tmp_path / "w.pth")


class _Runs:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class _Plain:
    pass


def write_both(folder, pickled: bytes) -> list:
    """The pickle in a zip and in the older stream."""
    write_zip(folder / "zip.pth", pickled)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (folder / "stream.pth").write_bytes(magic + pickled)
    return [folder / "zip.pth", folder / "stream.pth"]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("value", [_Runs(), {"w": _Runs()}, [_Plain(), _Runs()]])
def test_what_would_execute_is_refused_and_named(tmp_path, monkeypatch, protocol, value):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(value, protocol)
    (tmp_path / "bare.pth").write_bytes(pickled)
    for path in (*write_both(tmp_path, pickled), tmp_path / "bare.pth"):
        with pytest.raises(
            WeightsError, match=r"cannot be read.*(names '|has the opcode [A-Z0-9_]+, |no known format)"
        ):
            read_tensors(path)
    assert not (tmp_path / "executed").exists()


class _Loud:
    """Says so if it is built, or if its state is set."""

    def __init__(self):
        self.number = 1

    def __setstate__(self, state):
        raise AssertionError("it was built")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_objects_are_placeholders_that_nothing_built(tmp_path, protocol):
    value = {
        "args": _Loud(),
        "kind": _Plain,
        "path": Path("a"),
        "set": {1},
        "frozen": frozenset({2}),
        "data": [b"b", 1 << 40],
    }
    value |= {"shared": [pair := (0.9, 0.999), pair], "more": Counter("aab"), "when": datetime.date(2026, 1, 2)}
    write_zip(tmp_path / "w.pth", pickle.dumps(value, protocol))
    content = PthFile(tmp_path / "w.pth").content
    assert content.keys() == value.keys()
    assert content["args"].state == {"number": 1}
    assert isinstance(content["path"], Opaque)
    assert isinstance(content["more"], Opaque)
    assert content["shared"] == [(0.9, 0.999)] * 2
    assert issubclass(content["kind"], Opaque)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n.", "its pickle names 'os system', which would run code; nothing was run"),
        (b"cbuiltins\neval\n(X\x01\0\0\x001tR.", "its pickle names 'builtins eval'"),
        (b"c__builtin__\n__import__\n.", "its pickle names '__builtin__ __import__'"),
        (b"cposix\nsystem\n.", "its pickle names 'posix system'"),
        (b"csubprocess\nPopen\n.", "its pickle names 'subprocess Popen'"),
        (b"(S'ls'\nios\nsystem\n.", "opcode STRING"),
        (b"ctorch\nFloatStorage\n)R.", "calls something that makes no tensor"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls something that makes no tensor"),
        (b"K\x01.", "holds no tensors by name"),
        (b"}(X\x01\0\0\0aK\x01u.", "holds no tensors by name"),
        (b"K\x01Q.", "has a int where a tuple belongs"),
        (b"]K\x01b.", "state is not a dictionary"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.", "has no attribute '__dict__'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x01\0\0\0aK\x01stb.", "has no attribute 'a'"),
        (b"ca\nb\n}X\x01\0\0\0aK\x01sb.", "missing 1 required positional argument"),  # the state of a class
        (b"ca\nb\n)RK\x01\x85R.", "not callable"),  # a placeholder called
        (b"}K\x01\x85K\x01s.", "has a tuple as a key"),
        (b"}(K\x01\x85q\x01h\x01K\x01u.", "has a tuple as a key"),
        (b"\x8f(K\x01\x85\x90.", "has a tuple as a key"),
        (b"}K\x01\x85NbK\x01s.", "has a tuple as a key"),  # a tuple whose state was set to nothing
        (b"}r\xff\xff\xff\x7f.", "remembers more than 300,000 values"),
        (b"\x8a\x0a" + b"\x01" * 10 + b".", "opcode LONG1"),
        (b"\x8b\xff\xff\xff\x7f.", "is longer than any of a MobileNet"),
        (b"X\xff\xff\xff\x7fa.", "is longer than any of a MobileNet"),
        (b"h\x01.", "damaged or not"),
        (b"b.", "takes more values than it has"),
        (b"".join(b"ca\n%d\n" % i for i in range(1001)) + b".", "names more than 1,000 classes"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, body, message):
    write_zip(tmp_path / "w.pth", b"\x80\x02" + body)
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "w.pth")


def nest_tuples(depth: int) -> bytes:
    """Tuples that hold the one before twice: hashing or printing the last takes 2 ** depth steps."""
    twice = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return b"K\x01\x85" + twice


@pytest.mark.parametrize(
    "body",
    [
        b"}" + nest_tuples(60) + b"K\x01s.",  # as a key
        b"}X\x01\0\0\0a" + nest_tuples(60) + b"s.",  # as an entry
        nest_tuples(60) + b".",  # as the whole
        nest_tuples(60) + b"Q.",  # as a storage
        b"ctorch._utils\n_rebuild_tensor_v2\n" + nest_tuples(60) + b"R.",
        b"](" + b"]" * 290_000 + b"e.",
        b"]" * 140_000 + b"a" * 140_000 + b".",
        b"(" * 140_000 + b"t" * 140_000 + b".",
        b"X" + (300_000_000).to_bytes(4, "little") + b"a" * 17_000_000,
        b"cargparse\n" + b"N" * 17_000_000 + b"\n.",
    ],
)
def test_crafted_pickles_take_bounded_time(tmp_path, body):
    write_zip(tmp_path / "w.pth", b"\x80\x02" + body)
    begun = time.process_time()
    with pytest.raises(WeightsError) as caught:
        read_tensors(tmp_path / "w.pth")
    assert time.process_time() - begun < 10
    assert len(str(caught.value)) < 1000


def test_nested_lists_of_14_megabytes_are_refused(tmp_path):
    for path in write_both(tmp_path, b"\x80\x02" + b"]" * 7_000_000 + b"a" * 6_999_999 + b"."):
        begun = time.process_time()
        with pytest.raises(WeightsError, match="its pickle has more than 300,000 opcodes"):
            read_tensors(path)
        assert time.process_time() - begun < 10


def test_a_string_of_300_megabytes_takes_no_memory(tmp_path):
    path = tmp_path / "w.pth"
    with path.open("wb") as file:
        file.write(b"\x80\x02X" + (300_000_000).to_bytes(4, "little"))
        file.truncate(300_000_010)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match="its pickle is longer"):
        read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_parts_of_the_zip_are_checked_before_they_are_read(tmp_path):
    path, entry = tmp_path / "w.pth", dictionary(describe("w", (12,), (1,)))
    data = {"0": ELEMENTS.tobytes()}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "its part data/0 is missing"),
        ({"storages": data, "method": zipfile.ZIP_DEFLATED}, "its part byteorder is compressed"),
        ({"storages": data, "byteorder": "big"}, "big-endian"),
        ({"storages": {"0": b"123"}}, "multiple of element size"),
    )
    for arguments, message in refused:
        write_zip(path, entry, **arguments)
        with pytest.raises(WeightsError, match=message):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/model.json", "{}")
    with pytest.raises(WeightsError, match=r"without PyTorch's data\.pkl"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(2000):
            archive.writestr(f"{i:05}" + "n" * 5000, "")
    with pytest.raises(WeightsError, match="its list of entries is longer than any of a MobileNet"):
        read_tensors(path)


def test_a_stream_that_is_cut_off_or_of_another_version_is_refused(tmp_path, reference):
    data = (reference / "fixtures" / "torchvision_v2_035" / "weights_legacy.pth").read_bytes()
    path = tmp_path / "w.pth"
    for content, message in (
        (data[:-1], "is cut off"),
        (data[: len(data) // 2], "is cut off"),
        (data[:100], "damaged or not a file of torch.save"),
        (pickle.dumps(5, 2) + data, "it is no file of torch.save"),
        (data.replace(b"M\xe9\x03", b"M\xea\x03", 1), "of another version than 1001"),
        (data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1), "big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read_tensors(path)
