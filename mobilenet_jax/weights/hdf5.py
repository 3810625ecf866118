"""Keras' files: the weights of Keras 3, the older HDF5 of weights or a whole model, and the .keras zip.

Tensors are called LAYER/kernel, bias, gamma, beta, moving_mean and moving_variance, with layers in lower case.
"""

import io
import math
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mobilenet_jax.weights import WeightsError

_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_GROUPS_LIMIT = 5_000  # a MobileNet has about 300 layers
_ATTRIBUTE_LIMIT = 1_000_000  # bytes
_MEMORY = 250_000_000  # bytes of address space, besides the file's own; Python with h5py takes 120,000,000
_SECONDS = 60
_WEIGHTS_MEMBER = "model.weights.h5"


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a Keras file, in the order of its layers if the file states one.

    HDF5's library allocates as much memory as a length in the file says, and damaged files can crash it. It therefore
    runs in a child process with limited memory and time.

    Raises WeightsError for a file of another kind, and for one that refers to other files.
    """
    command = [sys.executable, "-m", __name__, str(path)]
    # `fetch.download` holds a lock on the file that it checks; reading needs none.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HDF5_USE_FILE_LOCKING": "FALSE"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise WeightsError(f"HDF5's library did not finish reading it in {_SECONDS} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise WeightsError(said[-1] if said else f"HDF5's library crashed on it, with code {done.returncode}")
    with np.load(io.BytesIO(done.stdout)) as arrays:
        return dict(arrays)


def _main(path: Path) -> None:
    """Write the tensors to standard output as .npz, or the error to standard error as one line."""
    limit = _MEMORY + 4 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        tensors = _read(path)
    except WeightsError as error:
        sys.exit(str(error))
    except Exception as error:  # h5py and zipfile raise many kinds for a damaged file
        sys.exit(f"it is damaged or not a Keras file: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
    np.savez(sys.stdout.buffer, allow_pickle=False, **tensors)


def _read(path: Path) -> dict[str, np.ndarray]:
    source = _open_zip(path) if zipfile.is_zipfile(path) else path
    with h5py.File(source, "r") as file:
        reader = _Reader(path.stat().st_size)
        if "model_weights" in file:
            return reader.read_layers(reader.group(file, "model_weights"))
        if "layer_names" in file.attrs:
            return reader.read_layers(file)
        return reader.read_numbered(reader.group(file, "layers"))


def _open_zip(path: Path) -> io.BytesIO:
    """Return the HDF5 file inside a .keras file, which Keras does not compress."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(_WEIGHTS_MEMBER)
        if info.file_size > path.stat().st_size:
            raise WeightsError(f"its {_WEIGHTS_MEMBER} is larger than the file")
        return io.BytesIO(archive.read(info))


class _Reader:
    """Reads arrays with no more bytes in total than the file has, whatever their headers say."""

    def __init__(self, size: int):
        self._left = size

    def group(self, parent: h5py.Group, path: str) -> h5py.Group:
        """Return the group at a path; raise WeightsError if there is none or it lies in another file."""
        for name in path.split("/"):
            parent = self._follow(parent, name, h5py.Group)
            if len(parent) > _GROUPS_LIMIT:
                raise WeightsError(f"its group {path!r} has more than {_GROUPS_LIMIT:,} entries")
        return parent

    def _follow(self, parent: h5py.Group, name: str, kind: type) -> Any:
        # Keras writes no soft or external links, which could lead to any file.
        if not isinstance(parent.get(name, getlink=True), h5py.HardLink) or not isinstance(parent[name], kind):
            raise WeightsError(f"it has no {kind.__name__.lower()} {name!r} in {parent.name!r}")
        return parent[name]

    def read_numbered(self, layers: h5py.Group) -> dict[str, np.ndarray]:
        """Read Keras 3's layout: layers/conv2d_10/vars/0, in order of creation; the layer's name is an attribute."""
        tensors = {}
        for number in map(str, layers):
            layer = self.group(layers, number)
            if "vars" not in layer:
                continue
            variables = self.group(layer, "vars")
            if not len(variables):
                continue
            name = self._strings(variables, "name")[0] if "name" in variables.attrs else number
            leaves = _NORM if len(variables) == len(_NORM) else ("kernel", "bias")
            for i in map(str, variables):
                leaf = leaves[int(i)] if i.isdecimal() and int(i) < len(leaves) else i
                tensors[_normalise(f"{name}/{leaf}")] = self._array(variables, i)
        return tensors

    def read_layers(self, layers: h5py.Group) -> dict[str, np.ndarray]:
        """Read Keras 2's layout: the names of layers and of their weights are attributes."""
        tensors = {}
        for layer in self._strings(layers, "layer_names"):
            group = self.group(layers, layer)
            for weight in self._strings(group, "weight_names"):
                inner, _, leaf = weight.rpartition("/")
                parent = self.group(group, inner) if inner else group
                clean = leaf.removesuffix(":0").replace("depthwise_kernel", "kernel")
                tensors[_normalise(f"{layer}/{clean}")] = self._array(parent, leaf)
        return tensors

    def _strings(self, owner: h5py.Group, name: str) -> list[str]:
        if name not in owner.attrs:
            raise WeightsError(f"its group {owner.name!r} has no attribute {name!r}")
        attribute = owner.attrs.get_id(name)
        if math.prod(attribute.shape) * attribute.dtype.itemsize > _ATTRIBUTE_LIMIT:
            raise WeightsError(
                f"the attribute {name!r} of its group {owner.name!r} is larger than any that Keras writes"
            )
        values = np.array(owner.attrs[name], object, ndmin=1)
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]

    def _array(self, owner: h5py.Group, name: str) -> np.ndarray:
        dataset: h5py.Dataset = self._follow(owner, name, h5py.Dataset)
        where = f"{owner.name}/{name}"
        if dataset.external or dataset.is_virtual:
            raise WeightsError(f"its array {where!r} lies in another file")
        self._left -= dataset.nbytes
        if self._left < 0 or dataset.dtype.hasobject:
            raise WeightsError(f"its array {where!r} of shape {list(dataset.shape)} is larger than the file")
        return dataset[()]


def _normalise(name: str) -> str:
    """Return Keras 3's name of a tensor; older V3 files have names such as expanded_conv/expand/BatchNorm."""
    layer, leaf = name.rsplit("/", 1)
    return f"{layer.lower().replace('/', '_').replace('batchnorm', 'bn')}/{leaf}"


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
