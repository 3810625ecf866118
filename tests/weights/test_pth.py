import io
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.load import read_tensors
from mobilenet_jax.weights.pth import read_pth
from mobilenet_jax.weights.save import _pickle_integers, _pickle_string, _to_pth


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


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("value", [_Runs(), {"w": _Runs()}, OrderedDict(a=_Plain()), _Plain()])
def test_nothing_is_executed_and_what_was_refused_is_named(tmp_path, monkeypatch, protocol, value):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(value, protocol)
    write_zip(tmp_path / "zip.pth", pickled)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (tmp_path / "stream.pth").write_bytes(magic + pickled)
    (tmp_path / "bare.pth").write_bytes(pickled)
    for name in ("zip", "stream", "bare"):
        with pytest.raises(WeightsError, match=r"its pickle (names '|has the opcode [A-Z0-9_]+, ).*nothing was run$"):
            read_tensors(tmp_path / f"{name}.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n.", "its pickle names 'os system', no part of a tensor; nothing was run"),
        (b"cbuiltins\neval\n(X\x01\0\0\x001tR.", "its pickle names 'builtins eval'"),
        (b"(S'ls'\nios\nsystem\n.", "opcode STRING"),
        (b"ctorch\nFloatStorage\n)R.", "calls something that makes no tensor"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls something that makes no tensor"),
        (b"K\x01.", "holds no state dict"),
        (b"}(X\x01\0\0\0aK\x01u.", "its entry 'a' is no tensor"),
        (b"}(K\x01K\x01u.", "has a int where a str belongs"),
        (b"K\x01Q.", "has a int where a tuple belongs"),
        (b"]K\x01b.", "state is not a dictionary"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.", "has no attribute '__dict__'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x01\0\0\0aK\x01stb.", "has no attribute 'a'"),
        (b"K\x01\x85q\x01h\x01\x86.", "refers to a tuple again"),
        (b"K\x01\x85K\x01Nbq\x01h\x01.", "refers to a tuple again"),
        (b"}r\xff\xff\xff\x7f.", "remembers more than 500,000 values"),
        (b"\x8a\x0a" + b"\x01" * 10 + b".", "opcode LONG1"),
        (b"X\xff\xff\xff\x7fa.", "expected 2147483647 bytes"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, body, message):
    write_zip(tmp_path / "w.pth", b"\x80\x02" + body)
    with pytest.raises(WeightsError, match=message):
        read_tensors(tmp_path / "w.pth")


def test_a_pickle_longer_than_a_state_dicts_is_refused(tmp_path):
    write_zip(tmp_path / "w.pth", b"\x80\x02](" + b"]" * 1_000_000 + b"e.")
    with pytest.raises(WeightsError, match="longer than 500,000 bytes"):
        read_pth(tmp_path / "w.pth")


def test_parts_of_the_zip_are_checked_before_they_are_read(tmp_path):
    path, entry = tmp_path / "w.pth", dictionary(describe("w", (12,), (1,)))
    data = {"0": ELEMENTS.tobytes()}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "its storage '0' is missing"),
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
    path.write_bytes(b"PK\x03\x04" + b"PK\x01\x02" * 30_000)
    with pytest.raises(WeightsError, match="more than 20,000 entries"):
        read_tensors(path)


def test_a_stream_that_is_cut_off_or_of_another_version_is_refused(tmp_path, reference):
    data = (reference / "fixtures" / "torchvision_v2_035" / "weights_legacy.pth").read_bytes()
    path = tmp_path / "w.pth"
    for content, message in (
        (data[:-1], "is cut off"),
        (data[: len(data) // 2], "is cut off"),
        (data[:100], "damaged or no pth file"),
        (pickle.dumps(5, 2) + data, "it is no file of torch.save"),
        (data.replace(b"M\xe9\x03", b"M\xea\x03", 1), "of another version than 1001"),
        (data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1), "big-endian"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read_tensors(path)
