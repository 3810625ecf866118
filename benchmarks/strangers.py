"""Files of weights as other frameworks write them, for tests and `mutate.py`. No framework is needed."""

import argparse
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.numpy import save_file

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.naming import Naming
from mobilenet_jax.weights.slim_names import SLIM
from mobilenet_jax.weights.torch_names import TIMM
from mobilenet_jax.weights.transformers_names import TRANSFORMERS


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


def make_module(tensors: dict) -> Module:
    """The object that torch.save pickles of a model: modules in modules."""
    root: dict = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = tensor

    def build(part: dict) -> Module:
        modules = {name: build(child) for name, child in part.items() if isinstance(child, dict)}
        own = {name: child for name, child in part.items() if not isinstance(child, dict)}
        buffers = {name: own.pop(name) for name in list(own) if name.startswith("running")}
        return Module(training=False, _parameters=own, _buffers=buffers, _modules=modules)

    return build(root)


def write_folder(folder: Path, tensors: dict, config: dict, processor: dict | None = None) -> Path:
    """A folder of Hugging Face: weights, the network's configuration, the image processor's if there is one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(tensors, folder / "model.safetensors")
    return folder


def encode(number: int, value: bytes | int) -> bytes:
    """A field of a protocol buffer."""

    def varint(value: int) -> bytes:
        more = value >> 7
        return bytes([value & 127 | 128]) + varint(more) if more else bytes([value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def encode_constant(name: str, tensor: np.ndarray, *, kind: int = 1, numbers: bytes | None = None) -> bytes:
    """A node of a GraphDef; `numbers` are written one by one in the place of the tensor's content."""
    shape = b"".join(encode(2, encode(1, size)) for size in tensor.shape)
    content = encode(4, tensor.tobytes()) if numbers is None else encode(5, numbers)
    value = encode(8, encode(1, kind) + encode(2, shape) + content)
    attribute = encode(1, b"value") + encode(2, value)
    node = encode(1, name.encode()) + encode(2, b"Const") + encode(5, encode(1, b"dtype") + encode(2, encode(6, 1)))
    return encode(1, node + encode(5, attribute))


def write_graph(path: Path, tensors: dict) -> Path:
    """A frozen GraphDef: the variables, and nodes that use them."""
    nodes = [encode_constant(name, tensor) for name, tensor in tensors.items()]
    used = [
        encode(1, encode(1, f"{name}/read".encode()) + encode(2, b"Identity") + encode(3, b"x")) for name in tensors
    ]
    shape = encode_constant("Reshape/shape", np.ones(2, "<i4"), kind=3)
    path.write_bytes(b"".join([*nodes, *used, shape]) + encode(4, encode(1, 27)))
    return path


def write_forms(folder: Path) -> list[Path]:
    """Write a small network in every form that people bring, and return the paths."""
    tiny = {"model": "mobilenet_v1", "width": 0.1, "num_classes": 3}
    _, _, timm = make_tensors(TIMM, **tiny)
    _, _, other = make_tensors(TIMM, **tiny, seed=1)
    _, _, slim = make_tensors(SLIM, **tiny)
    _, _, transformers = make_tensors(TRANSFORMERS, **tiny)
    _, _, keras = make_tensors(KERAS, **tiny)
    head = [keras.pop("conv_preds/kernel")[0, 0], keras.pop("conv_preds/bias")]
    checkpoint = {"state_dict": timm, "state_dict_ema": other, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    np.savez(folder / "slim.npz", **slim)  # pyright: ignore[reportArgumentType]
    config = {"model_type": "mobilenet_v1", "id2label": {"0": "a", "1": "b", "2": "c"}}
    processor = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3}
    hub = write_folder(folder / "hub", transformers, config, processor)
    return [
        write_checkpoint(folder / "checkpoint.pth.tar", checkpoint),
        write_checkpoint(folder / "model.pth", make_module(timm)),
        write_keras_3(folder / "nested.weights.h5", keras, {"dense": head}),
        write_keras_2(
            folder / "nested.h5", {"mobilenet_0.10_96": keras, "d": {"d/kernel": head[0], "d/bias": head[1]}}
        ),
        write_graph(folder / "frozen.pb", slim),
        folder / "slim.npz",
        *(hub / name for name in ("config.json", "preprocessor_config.json", "model.safetensors")),
    ]
