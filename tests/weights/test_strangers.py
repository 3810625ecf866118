"""Files of strangers: checkpoints, whole models, prefixes, other heads, saved Keras models, folders, graphs."""

import argparse
import json
import logging
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from strangers import Module, make_tensors, split_layers, write_checkpoint, write_keras_2, write_keras_3

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION

V2 = {"model": "mobilenet_v2", "width": 0.25, "num_classes": 3}


@pytest.fixture(scope="module")
def torchvision():
    """(spec, {path: variable}, {name: tensor}) of a torchvision V2 of 3 classes."""
    return make_tensors(TORCHVISION, **V2)


@pytest.fixture(scope="module")
def average():
    """The same network with other numbers."""
    return make_tensors(TORCHVISION, **V2, seed=1)


def assert_holds(variables: dict, flat: dict) -> None:
    found = traverse_util.flatten_dict(variables)
    assert found.keys() == flat.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))


def prefix(tensors: dict, start: str) -> dict:
    return {start + name: tensor for name, tensor in tensors.items()}


# Checkpoints.


def count(tensors: dict) -> dict:
    """With the counters that PyTorch's batch norm has."""
    means = [name for name in tensors if name.endswith("running_mean")]
    return {**tensors, **{name.replace("running_mean", "num_batches_tracked"): np.array(9) for name in means}}


FORMS = {
    "of the ImageNet example": lambda t, e: {"epoch": 3, "arch": "mobilenet_v2", "state_dict": prefix(t, "module.")},
    "of torchvision's references": lambda t, e: {
        "model": OrderedDict(count(t)),
        "optimizer": {"state": {0: {"momentum_buffer": np.ones((8, 3, 3, 3), "f4")}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"base_lrs": [0.1], "_step_count": 3},
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, output=Path("runs"), weights=None),
    },
    "of Lightning": lambda t, e: {
        "state_dict": prefix(t, "model."),
        "pytorch-lightning_version": "2.5",
        "callbacks": {"ModelCheckpoint{}": {"best": np.array(0.5, "f4")}},
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {}}],
    },
    "of a compiled network": lambda t, e: {"state_dict": prefix(t, "module._orig_mod.")},
    "a whole model": lambda t, e: make_module(t),
    "a whole model in a dict": lambda t, e: {"model": make_module(t), "epoch": 1},
    "of a parallel whole model": lambda t, e: Module(_modules={"module": make_module(t)}, _parameters={}, _buffers={}),
}
AVERAGED = {
    "of timm": lambda t, e: {"arch": "mobilenetv2", "state_dict": t, "state_dict_ema": e, "version": 2},
    "of torchvision's references": lambda t, e: {
        "model": t,
        "model_ema": {"n_averaged": np.array(4), **prefix(count(e), "module.")},
    },
    "in one dict": lambda t, e: {"state_dict": {**prefix(t, "net."), **prefix(e, "ema_net.")}},
    "whole models": lambda t, e: {"model": make_module(t), "ema": make_module(e)},
}


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


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_unwrapped(torchvision, tmp_path, form):
    spec, flat, tensors = torchvision
    path = write_checkpoint(tmp_path / "checkpoint.tar", FORMS[form](tensors, None))  # no suffix of weights
    model, variables, card = load_weights(path)
    assert model.spec == spec
    assert_holds(variables, flat)
    assert card["name"] == "torchvision/mobilenet_v2"


@pytest.mark.parametrize("form", AVERAGED)
def test_averaged_weights_are_preferred_and_the_choice_is_said(torchvision, average, tmp_path, caplog, form):
    caplog.set_level(logging.WARNING, logger="absl")
    path = write_checkpoint(tmp_path / "w.ckpt", AVERAGED[form](torchvision[2], average[2]))
    _, variables, card = load_weights(path)
    assert_holds(variables, average[1])
    note = next(note for note in card["notes"] if "averaged weights" in note)
    assert "ema" in note
    assert note in caplog.text
    with pytest.raises(WeightsError, match=r"holds no nothing; choose with select=NAME \(--select=NAME\): (.*), (.*)") as e:
        load_weights(path, select="nothing")
    labels = str(e.value).rpartition(": ")[2].split(", ")
    for label, (_, expected, _) in zip(labels, (torchvision, average), strict=True):
        assert_holds(load_weights(path, select=label)[1], expected)


def test_several_networks_without_averages_must_be_chosen(torchvision, average, tmp_path):
    tensors = {**prefix(torchvision[2], "student."), **prefix(average[2], "teacher.")}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"holds several networks; choose with .*: student, teacher$"):
        load_weights(tmp_path / "w.safetensors")
    assert_holds(load_weights(tmp_path / "w.safetensors", select="teacher")[1], average[1])


@pytest.mark.parametrize(
    "start", ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module.model.encoder.", "any thing/"]
)
def test_prefixes_are_removed_and_named(torchvision, tmp_path, start):
    save_file(prefix(torchvision[2], start), tmp_path / "w.bin")  # the content decides, not the suffix
    _, variables, card = load_weights(tmp_path / "w.bin")
    assert_holds(variables, torchvision[1])
    assert card["notes"] == [f"the prefix {start!r} of its names was removed"]


def test_names_that_begin_below_features_are_completed(torchvision):
    _, flat, tensors = torchvision
    bare = {name.replace("features.", "0."): tensor for name, tensor in tensors.items() if "features" in name}
    head = {"3.weight": tensors["classifier.1.weight"], "3.bias": tensors["classifier.1.bias"]}
    _, variables, card = load_weights({**bare, **head})  # nn.Sequential(features, pooling, flatten, linear)
    assert_holds(variables, flat)
    assert card["notes"] == ["'features.' was put in the place of '0.' in its names", "3 was taken as the classifier"]


def test_a_dict_of_arrays_is_loaded(torchvision):
    spec, flat, tensors = torchvision
    model, variables, card = load_weights({"state_dict": tensors, "epoch": 3})
    assert model.spec == spec
    assert_holds(variables, flat)
    assert len(card["source"]["sha256"]) == 64

    class Broken:
        shape, dtype = (3,), np.dtype("f4")

        def __array__(self, *_, **__):
            raise RuntimeError("it is on another device")

    with pytest.raises(WeightsError, match=r"classifier.1.bias of the dict is no array: it is on another device"):
        load_weights({**tensors, "classifier.1.bias": Broken()})
    with pytest.raises(WeightsError, match="the dict holds no MobileNet of .*; its tensors: none"):
        load_weights({})


# Other heads and stems.


def without(tensors: dict, start: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def test_a_dense_layer_of_another_name_is_the_classifier(torchvision):
    _, flat, tensors = torchvision
    head = {"classifier.weight": tensors["classifier.1.weight"], "classifier.bias": tensors["classifier.1.bias"]}
    _, variables, card = load_weights({**without(tensors, "classifier"), **head})
    assert_holds(variables, flat)
    assert card["notes"] == ["classifier was taken as the classifier"]


HEADS = {
    "of two layers": {"head.0.weight": (16, 1280), "head.0.bias": (16,), "head.2.weight": (3, 16), "head.2.bias": (3,)},
    "without bias": {"classifier.1.weight": (3, 1280)},
    "of another width": {"fc.weight": (3, 1281), "fc.bias": (3,)},
    "none": {},
}


@pytest.mark.parametrize("head", HEADS)
def test_another_head_can_be_dropped_and_the_error_says_so(torchvision, head):
    spec, flat, tensors = torchvision
    more = {name: np.ones(shape, "f4") for name, shape in HEADS[head].items()}
    given = {**without(tensors, "classifier"), **more}
    if more:
        with pytest.raises(WeightsError, match=r'behind the pooling it is torchvision/mobilenet_v2: classifier="drop"'):
            load_weights(given)
    model, variables, card = load_weights(given, classifier="drop")
    assert model.spec.num_classes == 0
    assert_holds(variables, {path: leaf for path, leaf in flat.items() if path[1] != "classifier"})
    assert card["notes"] == ([f"left out: {', '.join(more)}"] if more else [])
    with pytest.raises(ValueError, match="classifier is 'none'; valid: keep, drop"):
        load_weights(given, classifier="none")


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v4_conv_small"])
def test_timms_features_alone_are_a_backbone(model):
    spec, flat, tensors = make_tensors(TIMM, model, width=0.25, num_classes=3)
    lost = ("conv_head", "bn2", "norm_head", "classifier")  # of features_only=True
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    found, variables, card = load_weights(given, classifier="drop")
    assert found.spec.blocks == spec.blocks
    ends = ("hidden", "classifier", *(["head"] if model == "mobilenet_v2" else []))
    assert_holds(variables, {path: leaf for path, leaf in flat.items() if path[1] not in ends})
    assert card["model"] == model


def test_a_stem_for_grey_images_is_refused_or_summed(torchvision):
    _, flat, tensors = torchvision
    name, path = "features.0.0.weight", ("params", "stem", "conv", "kernel")
    grey = {**tensors, name: tensors[name][:, :1]}
    with pytest.raises(WeightsError, match=r"a stem for 1 channels, not for the 3 of RGB images; in_channels=1 loads it"):
        load_weights(grey)
    model, variables, _ = load_weights(grey, in_channels=1)
    assert model.spec.in_channels == 1
    assert_holds(variables, {**flat, path: flat[path][:, :, :1]})
    model, variables, card = load_weights(grey, in_channels=3)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel.sum(2, keepdims=True), flat[path][:, :, :1], rtol=1e-6)
    assert card["notes"] == ["the kernel of the stem was summed over 1 channels and shared among 3"]
    model, variables, _ = load_weights(tensors, in_channels=1)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel, flat[path].sum(2, keepdims=True), rtol=1e-6)
    assert model.spec.in_channels == 1


# Keras models as people save them.


@pytest.fixture(scope="module")
def keras():
    """(spec, {path: variable}, backbone's tensors, [kernel, bias]) of Keras' V2 with a new dense layer."""
    spec, flat, tensors = make_tensors(KERAS, **V2)
    backbone = without(tensors, "predictions")
    return spec, flat, backbone, [tensors["predictions/kernel"], tensors["predictions/bias"]]


def list_names(tensors: dict) -> dict:
    """The names of weights inside a layer of Keras 2."""
    return {name.replace("conv1/", "Conv1/"): tensor for name, tensor in tensors.items()}


def describe(*layers: tuple[str, dict]) -> str:
    """The JSON of a saved model: an input of 96 px, a backbone, more layers."""
    inner = {"class_name": "Functional", "config": {"layers": [{"class_name": "Conv2D", "config": {}}]}}
    first = {"class_name": "InputLayer", "config": {"batch_shape": [None, 96, 96, 3]}}
    more = [{"class_name": kind, "config": config} for kind, config in layers]
    return json.dumps({"class_name": "Sequential", "config": {"layers": [first, inner, *more]}})


@pytest.mark.parametrize("form", ["weights of Keras 3", "model of Keras 2", "flat model of Keras 2"])
def test_a_backbone_inside_a_keras_model_is_found(keras, tmp_path, form):
    spec, flat, backbone, (kernel, bias) = keras
    path, dense = tmp_path / "mine.h5", {"dense_4/kernel": kernel, "dense_4/bias": bias}
    if form.startswith("weights"):
        write_keras_3(path, backbone, {"dense_4": [kernel, bias], "dropout": []})
    elif form.startswith("model"):
        write_keras_2(path, {"mobilenetv2_0.25_96": list_names(backbone), "dropout": {}, "dense_4": dense})
    else:
        layers = {layer: {n: backbone[n] for n in backbone if n.startswith(f"{layer}/")} for layer in split_layers(backbone)}
        write_keras_2(path, {**layers, "dense_4": {f"sequential/{name}": values for name, values in dense.items()}})
    model, variables, card = load_weights(path)
    assert model.spec == spec
    assert_holds(variables, flat)
    assert card["notes"][0] == "dense_4 was taken as the classifier"
    assert "preprocess_input" in card["notes"][1]


def test_the_configuration_of_a_keras_model_is_followed(keras, tmp_path):
    _, _, backbone, (kernel, bias) = keras
    layers = {"mobilenetv2_0.25_96": list_names(backbone), "dense": {"dense/kernel": kernel, "dense/bias": bias}}
    scaled = describe(("Rescaling", {"scale": 1 / 255, "offset": [0, 0, -1]}))
    _, _, card = load_weights(write_keras_2(tmp_path / "w.h5", layers, model_config=scaled))
    given = card["preprocessing"]
    assert (given["image_size"], given["mean"]) == (96, [0, 0, 255])
    assert given["std"] == pytest.approx([255] * 3)
    assert card["notes"] == ["dense was taken as the classifier"]
    write_keras_2(tmp_path / "w.h5", layers, model_config=describe(("GlobalMaxPooling2D", {})))
    with pytest.raises(WeightsError, match="its pooling takes the maximum"):
        load_weights(tmp_path / "w.h5")
    assert load_weights(tmp_path / "w.h5", classifier="drop")[0].spec.num_classes == 0
    for config in ("[" * 100_000, "{", describe(("Rescaling", {"scale": 0, "offset": 0}))):
        write_keras_2(tmp_path / "w.h5", layers, model_config=config)
        with pytest.raises(WeightsError, match="the configuration of its model cannot be used"):
            load_weights(tmp_path / "w.h5")


def test_a_v2_file_is_compared_with_v2(keras, tmp_path):
    _, _, backbone, (kernel, bias) = keras
    lost = without(backbone, "block_3_project")
    write_keras_3(tmp_path / "w.h5", lost, {"a": [kernel, bias], "b": [kernel, bias]})
    with pytest.raises(WeightsError, match=r"does not fit keras/MobileNetV2: .*it lacks block_3_project/kernel"):
        load_weights(tmp_path / "w.h5")
    write_keras_3(tmp_path / "w.h5", backbone, {"a": [kernel], "b": [kernel, bias]})
    with pytest.raises(WeightsError, match=r"unknown a/kernel, b/kernel, b/bias; without .* keras/MobileNetV2: class"):
        load_weights(tmp_path / "w.h5")
    write_keras_3(tmp_path / "w.h5", backbone, {"a": [kernel[:, :1], bias[:1]]})
    with pytest.raises(WeightsError, match="a classifier of one output, for a sigmoid"):
        load_weights(tmp_path / "w.h5")
    assert load_weights(tmp_path / "w.h5", classifier="drop")[0].spec.num_classes == 0


def test_keras_v3_without_its_top_has_its_classifier_behind_the_pooling():
    _, flat, tensors = make_tensors(KERAS, "mobilenet_v3_small", width=0.5, num_classes=3)
    backbone = {n: t for n, t in tensors.items() if not n.startswith(("conv_2/", "logits/"))}
    width = backbone["conv_1/kernel"].shape[-1]
    head = {"dense/kernel": np.ones((width, 5), "f4"), "dense/bias": np.zeros(5, "f4")}
    model, variables, _ = load_weights({**backbone, **head})
    assert (model.spec.hidden, model.spec.num_classes) == (0, 5)
    assert variables["params"]["classifier"]["kernel"].shape == (width, 5)
    np.testing.assert_array_equal(variables["params"]["stem"]["norm"]["scale"], flat["params", "stem", "norm", "scale"])
