"""Keras' files: the weights of Keras 3, the older HDF5 of weights or a whole model, and the .keras zip.

Tensors are called LAYER/kernel, bias, gamma, beta, moving_mean and moving_variance, with layers in lower case.
"""

import io
import math
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mobilenet_jax.weights import WeightsError

_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_GROUPS_LIMIT = 5_000  # a MobileNet has about 300 layers
_TENSORS_LIMIT = 5_000
_DEPTH_LIMIT = 8  # of models in each other
_ATTRIBUTE_LIMIT = 1_000_000  # bytes
_CONFIG_LIMIT = 10_000_000  # bytes of JSON; that of V3-Large has 300,000
_MEMORY = 250_000_000  # bytes of address space, besides the file's own; Python with h5py takes 120,000,000
_CPU_SECONDS = 10
_SECONDS = 60  # on the clock, on a machine that does other work too
_WATCH = sys.platform == "darwin"  # macOS does not enforce the limit of memory
_WEIGHTS_MEMBER, _CONFIG_MEMBER = "model.weights.h5", "config.json"
_CONFIG = "/config"  # the key of the model's configuration among the tensors, whose names begin with their layer's


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Return (tensors, the JSON of the model's configuration) of a Keras file; the latter is empty if it has none.

    The tensors are in the order of the layers if the file states one. HDF5's library allocates as much memory as a
    length in the file says, and damaged files can crash it. It therefore runs in a child process with limited memory
    and time.

    Raises WeightsError for a file of another kind, and for one that refers to other files.
    """
    command = [sys.executable, "-m", __name__, str(path)]
    # `fetch.download` holds a lock on the file that it checks; reading needs none.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HDF5_USE_FILE_LOCKING": "FALSE"}
    limit = _limit_memory(path)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output, errors = _wait(process, limit)
        except BaseException:
            process.kill()
            raise
    if process.returncode == -signal.SIGXCPU:
        raise WeightsError(f"HDF5's library did not finish reading it in {_CPU_SECONDS} s of CPU time")
    if process.returncode:
        said = errors.decode(errors="replace").strip().splitlines()
        raise WeightsError(said[-1] if said else f"HDF5's library crashed on it, with code {process.returncode}")
    with np.load(io.BytesIO(output)) as arrays:
        tensors = dict(arrays)
    return tensors, tensors.pop(_CONFIG, np.empty(0, np.uint8)).tobytes().decode(errors="replace")


def _limit_memory(path: Path) -> int:
    return _MEMORY + 4 * path.stat().st_size


def _wait(process: subprocess.Popen, limit: int) -> tuple[bytes, bytes]:
    """Return what the process writes; raise WeightsError if it takes too long, or more than `limit` bytes."""
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return process.communicate(timeout=0.2)
        except subprocess.TimeoutExpired as error:
            if time.monotonic() > deadline:
                raise WeightsError(f"HDF5's library did not finish reading it in {_SECONDS} s") from error
        if _WATCH and _measure_memory(process.pid) > limit:
            raise WeightsError(f"HDF5's library took more than {limit:,} bytes of memory to read it")


def _measure_memory(pid: int) -> int:
    """Return the bytes of memory that a process has; 0 if it has ended."""
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=False).stdout.split()
    return 1024 * int(listed[0]) if listed else 0


def _main(path: Path) -> None:
    """Write the tensors to standard output as .npz, or the error to standard error as one line."""
    limit = _limit_memory(path)
    if not _WATCH:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
    try:
        tensors = _read(path)
    except WeightsError as error:
        sys.exit(str(error))
    except Exception as error:  # h5py and zipfile raise many kinds for a damaged file
        sys.exit(f"it is damaged or not a Keras file: {(str(error) or type(error).__name__).splitlines()[0][:200]}")
    np.savez(sys.stdout.buffer, allow_pickle=False, **tensors)


def _read(path: Path) -> dict[str, np.ndarray]:
    config, source = _open_zip(path) if zipfile.is_zipfile(path) else (b"", path)
    with h5py.File(source, "r") as file:
        reader = _Reader(path.stat().st_size)
        if "model_weights" in file or "layer_names" in file.attrs:
            config = reader.config(file)
            tensors = reader.read_layers(reader.group(file, "model_weights") if "model_weights" in file else file)
        else:
            tensors = reader.read_numbered(reader.group(file, "layers"))
    return {**tensors, _CONFIG: np.frombuffer(config, np.uint8)}


def _open_zip(path: Path) -> tuple[bytes, io.BytesIO]:
    """Return (configuration, HDF5 file) of a .keras file; Keras does not compress the second."""
    with zipfile.ZipFile(path) as archive:
        for member, limit in ((_WEIGHTS_MEMBER, path.stat().st_size), (_CONFIG_MEMBER, _CONFIG_LIMIT)):
            if member in archive.namelist() and archive.getinfo(member).file_size > limit:
                raise WeightsError(f"its {member} is larger than the file, or than any that Keras writes")
        config = archive.read(_CONFIG_MEMBER) if _CONFIG_MEMBER in archive.namelist() else b""
        return config, io.BytesIO(archive.read(_WEIGHTS_MEMBER))


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

    def config(self, file: h5py.File) -> bytes:
        """Return the JSON of a whole model's configuration; empty for a file of weights alone."""
        return self._strings(file, "model_config")[0].encode() if "model_config" in file.attrs else b""

    def read_numbered(self, layers: h5py.Group, depth: int = 0) -> dict[str, np.ndarray]:
        """Read Keras 3's layout: layers/conv2d_10/vars/0, in order of creation; the layer's name is an attribute.

        The layers of a model inside the model are in layers/functional/layers.
        """
        tensors = {}
        for number in map(str, layers):
            layer = self.group(layers, number)
            if "layers" in layer:
                if depth > _DEPTH_LIMIT:
                    raise WeightsError(f"it has more than {_DEPTH_LIMIT} models in each other")
                self._add(tensors, self.read_numbered(self.group(layer, "layers"), depth + 1))
            if "vars" not in layer:
                continue
            variables = self.group(layer, "vars")
            if not len(variables):
                continue
            name = self._strings(variables, "name")[0] if "name" in variables.attrs else number
            leaves = _NORM if len(variables) == len(_NORM) else ("kernel", "bias")
            for i in map(str, variables):
                leaf = leaves[int(i)] if i.isdecimal() and int(i) < len(leaves) else i
                self._add(tensors, {_normalise(f"{name}/{leaf}"): self._array(variables, i)})
        return tensors

    def read_layers(self, layers: h5py.Group) -> dict[str, np.ndarray]:
        """Read Keras 2's layout: the names of layers and of their weights are attributes.

        A model inside the model is one of the layers, with the weights of all its layers.
        """
        tensors = {}
        for layer in self._strings(layers, "layer_names"):
            group = self.group(layers, layer)
            paths = [tuple(weight.rpartition("/")[::2]) for weight in self._strings(group, "weight_names")]
            inners = list(dict.fromkeys(inner for inner, _ in paths))
            first = {inner.partition("/")[0] for inner in inners}
            # A model's name before the names of all its layers.
            start = f"{first.pop()}/" if len(first) == 1 and all("/" in inner for inner in inners) else ""
            for inner, leaf in paths:
                parent = self.group(group, inner) if inner else group
                clean = leaf.removesuffix(":0").replace("depthwise_kernel", "kernel")
                owner = inner.removeprefix(start) if len(inners) > 1 else layer
                self._add(tensors, {_normalise(f"{owner}/{clean}"): self._array(parent, leaf)})
        return tensors

    def _add(self, tensors: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> None:
        """Add tensors; raise WeightsError if a name is there already, or if there are too many."""
        if double := next((name for name in more if name in tensors), None):
            raise WeightsError(f"it has two tensors called {double!r}")
        tensors.update(more)
        if len(tensors) > _TENSORS_LIMIT:
            raise WeightsError(f"it has more than {_TENSORS_LIMIT:,} tensors")

    def _strings(self, owner: h5py.Group, name: str) -> list[str]:
        if name not in owner.attrs:
            raise WeightsError(f"its group {owner.name!r} has no attribute {name!r}")
        attribute = owner.attrs.get_id(name)
        if math.prod(attribute.shape) * attribute.dtype.itemsize > _ATTRIBUTE_LIMIT:
            raise WeightsError(
                f"the attribute {name!r} of its group {owner.name!r} is larger than any that Keras writes"
            )
        values = np.array(owner.attrs[name], object, ndmin=1)
        if len(values) > _TENSORS_LIMIT:
            raise WeightsError(
                f"the attribute {name!r} of its group {owner.name!r} has more than {_TENSORS_LIMIT:,} names"
            )
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
