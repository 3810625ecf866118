"""Files as other frameworks write them, written by hand: no framework is needed."""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights.naming import Naming


def make_tensors(naming: Naming, model: str, *, seed: int = 0, **options) -> tuple[Spec, dict, dict[str, np.ndarray]]:
    """(spec, {path: variable}, {name: tensor}) of a framework's network with random numbers."""
    entry = next(entry for entry in naming.entries if entry.model == model)
    spec = make_spec(model, convention=entry.convention, **options)
    generator = np.random.default_rng(seed)
    flat = {path: generator.uniform(0.5, 1, shape).astype("f4") for path, shape in variable_shapes(spec).items()}
    slots = naming.list_slots(spec)
    return spec, flat, {name: np.ascontiguousarray(s.to_tensor(flat[s.path])) for name, s in slots.items()}


class _Global:
    """A class or function of PyTorch, by name."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("it is a name")


class _Storage:
    def __init__(self, key: str, kind: str, size: int):
        self.key, self.kind, self.size = key, kind, size


class Module:
    """A whole model: it is pickled as an object of a class of PyTorch."""

    def __init__(self, **state: Any):
        self.state = state


class _Pickler(pickle._Pickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Writes arrays as PyTorch writes tensors, and the names of classes that are not there."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages: dict[str, np.ndarray] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _Global("torch", obj.kind), obj.key, "cpu", obj.size
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Module):
            return _Global("torchvision.models.mobilenetv2", "MobileNetV2"), (), obj.state
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        key, kind = str(len(self.storages)), {"f": "FloatStorage", "i": "LongStorage"}[obj.dtype.kind]
        self.storages[key] = obj
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(obj.ndim))
        arguments = (_Storage(key, kind, obj.size), 0, obj.shape, strides, False, OrderedDict())
        return _Global("torch._utils", "_rebuild_tensor_v2"), arguments

    def save_name(self, obj: _Global) -> None:
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())  # pyright: ignore[reportAttributeAccessIssue]

    dispatch = {**pickle._Pickler.dispatch, _Global: save_name}  # noqa: RUF012  # pyright: ignore


def write_checkpoint(path: Path, value: Any) -> Path:
    """The zip of torch.save of a value in which arrays stand for tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            pickler = _Pickler(file)
            pickler.dump(value)
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_keras_2(path: Path, layers: dict[str, dict[str, np.ndarray]], **attributes: str) -> Path:
    """A whole model's HDF5 of Keras 2: {layer: {path of a weight in it: array}}, with the optimizer's state beside."""
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        top = file.create_group("model_weights")
        top.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, weights in layers.items():
            group = top.create_group(layer)
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in weights]
            for name, values in weights.items():
                group.create_dataset(f"{name}:0", data=values)
        file["optimizer_weights/adam/iteration"] = 7
    return path


def split_layers(tensors: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """{layer: its arrays in order} of Keras' tensors."""
    layers: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition("/")[0], []).append(tensor)
    return layers


def write_keras_3(path: Path, backbone: dict[str, np.ndarray], others: dict[str, list[np.ndarray]]) -> Path:
    """The weights of Keras 3: a backbone inside a model, the model's other layers, the optimizer's state."""
    with h5py.File(path, "w") as file:

        def write(layers: dict[str, list[np.ndarray]], where: str) -> None:
            for i, (name, arrays) in enumerate(layers.items()):
                variables = file.create_group(f"{where}/layer_{i}/vars")
                variables.attrs["name"] = name
                for j, values in enumerate(arrays):
                    variables.create_dataset(str(j), data=values)

        write(split_layers(backbone), "layers/functional/layers")
        write(others, "layers")
        file.create_group("layers/functional/vars")
        file["optimizer/vars/0"] = 7
    return path
