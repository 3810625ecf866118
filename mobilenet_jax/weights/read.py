"""A file of weights of any format -> its tensors by name. The content decides the format, whatever the suffix."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.hdf5 import read_hdf5
from mobilenet_jax.weights.pth import BYTES_LIMIT as PTH_LIMIT
from mobilenet_jax.weights.pth import ZIP_MAGIC, PthFile, open_zip
from mobilenet_jax.weights.tensorflow import read_graph, read_npz

Tensors = Mapping[str, np.ndarray]
BYTES_LIMIT = 320_000_000  # twice the size of the largest MobileNet, V4-Hybrid-Large with 151 MB in float32
KERAS_CONFIG = "keras_config"  # the key of the metadata that has the JSON of a Keras model
_HEADER_LIMIT = 8_000_000  # bytes of a safetensors header; the header of a MobileNet has 100,000
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# Starts of files that hold no weights this package can read, and what they are.
_OTHERS = (
    (b"<!doctype", "a web page, perhaps of a login or an error"),
    (b"<html", "a web page, perhaps of a login or an error"),
    (b"<?xml", "an XML file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it points to; git lfs pull fetches that"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x93NUMPY", "a single NumPy array; valid: an .npz of all variables"),
    (b"GGUF", "a GGUF file"),
    (b"\x00asm", "a WebAssembly program"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"{", "a JSON file"),
)


class Contents(NamedTuple):
    """The content of a file, before anything is chosen of it.

    `tree` has an entry with a `shape` for each tensor, in dicts of dicts; `load` returns the numbers of chosen entries.
    """

    tree: Any
    load: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    metadata: dict[str, str]


def read_contents(path: Path) -> Contents:
    """Return what a file holds; nothing in it is executed.

    Raises WeightsError, with one sentence, for a file that cannot be read; `load` raises it for damaged numbers.
    """
    with _naming(path, "a file of weights"):
        size = path.stat().st_size
        if size > PTH_LIMIT:
            raise WeightsError(f"it has {size:,} bytes; no MobileNet has more than {PTH_LIMIT:,}")
        kind, read = _find_format(path)
    with _naming(path, kind):
        contents = read(path)

    def load(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with _naming(path, kind):
            return contents.load(tensors)

    return contents._replace(load=load)


@contextlib.contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn every error into a WeightsError that names the file and what it should be."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # zipfile, safetensors and pickle raise many kinds for a damaged file
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"{path} cannot be read, it is damaged or not {kind}: {said}") from error


def _check_size(path: Path) -> None:
    """Raise WeightsError for a file that is larger than that of any MobileNet without optimizer."""
    if path.stat().st_size > BYTES_LIMIT:
        raise WeightsError(f"it has {path.stat().st_size:,} bytes; no MobileNet has more than {BYTES_LIMIT:,}")


def _find_format(path: Path) -> tuple[str, Callable[[Path], Contents]]:
    """Return (what the file is, its reader); raise WeightsError if it is something else."""
    with path.open("rb") as file:
        start = file.read(1024)
    if start.startswith(ZIP_MAGIC):
        return "a zip file of weights", _read_zip
    if start.startswith(_HDF5_MAGIC):
        return "a Keras file", _read_keras
    if start[8:9] == b"{":
        return "a safetensors file", _read_safetensors
    if start.startswith(b"\x80"):
        return "a file of torch.save", _read_pth
    if not start.strip(b"\0"):
        raise WeightsError("it is empty" if not start else "it begins with zeros, as a download that broke off")
    if start[4:8] == b"TFL3":
        raise WeightsError("it is a TensorFlow Lite model, whose weights are folded or quantised")
    if start[257:262] == b"ustar":
        raise WeightsError("it is a tar archive; unpack it first")
    for magic, what in _OTHERS:
        if start.lstrip().lower().startswith(magic.lower()):
            raise WeightsError(f"it is {what}")
    if start.startswith(b"\x0a") or path.suffix == ".pb":
        return "a frozen GraphDef of TensorFlow", _read_graph
    if ".data-0" in path.name or path.suffix == ".index":
        raise WeightsError("it is a part of a TensorFlow checkpoint; valid: a frozen GraphDef, or an .npz of variables")
    if start.startswith(b"\x08") and b"onnx" in path.suffix.encode():
        raise WeightsError("it is an ONNX model")
    raise WeightsError(
        "it has no known format; valid: files of torch.save, safetensors, Keras' HDF5 and .keras, an .npz of "
        "variables, a frozen GraphDef"
    )


def _hold(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Contents:
    return Contents(tensors, dict, metadata or {})


def _read_zip(path: Path) -> Contents:
    with path.open("rb") as file, open_zip(file, limit=0) as archive:
        names = archive.namelist()
    if "model.weights.h5" in names:
        return _read_keras(path)
    if any(name.endswith("/data.pkl") for name in names):
        return _read_pth(path)
    if names and all(name.endswith(".npy") for name in names):
        return Contents(read_npz(path, limit=BYTES_LIMIT), dict, {})
    if any(name.endswith("saved_model.pb") for name in names):
        raise WeightsError("it is a zip file of a TensorFlow SavedModel")
    raise WeightsError("it is a zip file without PyTorch's data.pkl, Keras' model.weights.h5 or NumPy's arrays")


def _read_keras(path: Path) -> Contents:
    _check_size(path)
    tensors, config = read_hdf5(path)
    return _hold(tensors, {KERAS_CONFIG: config} if config else None)


def _read_pth(path: Path) -> Contents:
    file = PthFile(path)
    return Contents(file.content, file.load, {})


def _read_graph(path: Path) -> Contents:
    _check_size(path)
    return Contents(read_graph(path.read_bytes()), dict, {})


def _read_safetensors(path: Path) -> Contents:
    _check_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(_HEADER_LIMIT, path.stat().st_size):
        raise WeightsError(f"its header of {length:,} bytes is larger than that of any MobileNet, or than the file")
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _hold(tensors, file.metadata() or {})
