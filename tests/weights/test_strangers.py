"""Files of strangers: checkpoints, whole models, prefixes, other heads, saved Keras models, folders, graphs."""

import argparse
import json
import logging
import time
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from benchmarks.strangers import (
    Module,
    encode,
    encode_constant,
    make_module,
    make_tensors,
    split_layers,
    write_checkpoint,
    write_folder,
    write_graph,
    write_keras_2,
    write_keras_3,
)
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import KERAS_EXAMPLE
from mobilenet_jax.weights.keras_config import read_preprocessing
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.slim_names import SLIM
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION
from mobilenet_jax.weights.transformers_names import TRANSFORMERS

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
    with pytest.raises(
        WeightsError, match=r"holds no nothing; choose with select=NAME \(--select=NAME\): (.*), (.*)"
    ) as e:
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
    with pytest.raises(WeightsError, match=r"the dict holds no MobileNet of .*; its tensors: none"):
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
    _, flat, tensors = torchvision
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


@pytest.mark.parametrize("framework", [TORCHVISION, TRANSFORMERS, TIMM, KERAS], ids=lambda naming: naming.framework)
def test_a_layer_more_before_the_pooling_is_never_left_out(framework):
    spec, _, tensors = make_tensors(framework, "mobilenet_v2", width=0.1, num_classes=3)
    layer, suffix = framework.name_layers(spec)["block_01/project"][0], framework.leaves["kernel"][0]
    more = f"{layer.rpartition('.')[0]}.more" if "." in layer else f"{layer}/more"
    given = {**tensors, f"{more}{suffix}": np.ones((1, 1, 8, 8), "f4")}
    with pytest.raises(WeightsError, match=r"it has unknown .*more"):
        load_weights(given, classifier="drop")


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
    with pytest.raises(
        WeightsError, match=r"a stem for 1 channels, not for the 3 of RGB images; in_channels=1 loads it"
    ):
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
        layers = {
            layer: {n: backbone[n] for n in backbone if n.startswith(f"{layer}/")} for layer in split_layers(backbone)
        }
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


def test_configurations_of_keras_models_that_cannot_be_followed():
    pooled = describe(("GlobalMaxPooling2D", {}))
    with pytest.raises(WeightsError, match="its pooling takes the maximum"):
        read_preprocessing(pooled, drop=False)
    assert read_preprocessing(pooled, drop=True)[0].image_size == 96
    for config in ("[" * 100_000, "{", describe(("Rescaling", {"scale": 0, "offset": 0})), describe(("Rescaling", {}))):
        with pytest.raises(WeightsError, match="the configuration of its model cannot be used"):
            read_preprocessing(config, drop=False)
    assert read_preprocessing("", drop=False)[0] == KERAS_EXAMPLE


def test_a_v2_file_is_compared_with_v2(keras):
    _, _, backbone, (kernel, bias) = keras
    lost = without(backbone, "block_3_project")
    with pytest.raises(WeightsError, match=r"does not fit keras/MobileNetV2: .*it lacks block_3_project/kernel"):
        load_weights({**lost, "a/kernel": kernel, "a/bias": bias, "b/kernel": kernel})
    with pytest.raises(WeightsError, match=r"unknown a/kernel, b/kernel, b/bias; without .* keras/MobileNetV2: class"):
        load_weights({**backbone, "a/kernel": kernel, "b/kernel": kernel, "b/bias": bias})
    sigmoid = {**backbone, "a/kernel": kernel[:, :1], "a/bias": bias[:1]}
    with pytest.raises(WeightsError, match="a classifier of one output, for a sigmoid"):
        load_weights(sigmoid)
    assert load_weights(sigmoid, classifier="drop")[0].spec.num_classes == 0


def test_keras_v3_without_its_top_has_its_classifier_behind_the_pooling():
    _, flat, tensors = make_tensors(KERAS, "mobilenet_v3_small", width=0.5, num_classes=3)
    backbone = {n: t for n, t in tensors.items() if not n.startswith(("conv_2/", "logits/"))}
    width = backbone["conv_1/kernel"].shape[-1]
    head = {"dense/kernel": np.ones((width, 5), "f4"), "dense/bias": np.zeros(5, "f4")}
    model, variables, _ = load_weights({**backbone, **head})
    assert (model.spec.hidden, model.spec.num_classes) == (0, 5)
    assert variables["params"]["classifier"]["kernel"].shape == (width, 5)
    np.testing.assert_array_equal(variables["params"]["stem"]["norm"]["scale"], flat["params", "stem", "norm", "scale"])


# Folders of Hugging Face.


PROCESSOR = {"size": {"shortest_edge": 128}, "crop_size": {"height": 96, "width": 96}, "resample": 3}
PROCESSOR |= {"image_mean": [0.5, 0.5, 0.25], "image_std": [0.5, 0.5, 1.0], "rescale_factor": 1 / 255}


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2"])
def test_folders_of_transformers(tmp_path, model):
    spec, flat, tensors = make_tensors(TRANSFORMERS, model, width=0.25, num_classes=3)
    body = prefix(without(tensors, "classifier"), f"{model}.")
    head = {name: tensors[name] for name in ("classifier.weight", "classifier.bias")}
    config = {"model_type": model, "id2label": {"1": "dog", "0": "cat", "2": "cow"}, "layer_norm_eps": 0.002}
    folder = write_folder(tmp_path / "hub", {**body, **head}, {**config, "tf_padding": False}, PROCESSOR)
    found, variables, card = load_weights(folder)
    assert found.spec == replace(spec, padding="symmetric", bn_epsilon=0.002)
    assert_holds(variables, flat)
    assert (card["name"], card["class_names"], card["notes"]) == (f"transformers/{model}", ["cat", "dog", "cow"], [])
    given = card["preprocessing"]
    assert (given["image_size"], given["crop_share"], given["interpolation"]) == (96, 0.75, "bicubic")
    assert given["mean"] == pytest.approx([127.5, 127.5, 63.75])
    assert given["std"] == pytest.approx([127.5, 127.5, 255])
    # The bare model has no prefix, and PyTorch's format is older than safetensors.
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder / "pytorch_model.bin", OrderedDict(without(tensors, "classifier")))
    found, variables, _ = load_weights(folder)
    assert found.spec.num_classes == 0
    assert_holds(variables, {path: leaf for path, leaf in flat.items() if path[1] != "classifier"})


def test_names_of_transformers():
    # transformers 4.57, modeling_mobilenet_v1.py and modeling_mobilenet_v2.py
    for model, some in (
        ("mobilenet_v1", {"conv_stem.convolution.weight": (32, 3, 3, 3), "layer.0.convolution.weight": (32, 1, 3, 3)}),
        ("mobilenet_v1", {"layer.25.convolution.weight": (1024, 1024, 1, 1), "classifier.weight": (1001, 1024)}),
        ("mobilenet_v2", {"conv_stem.first_conv.convolution.weight": (32, 3, 3, 3)}),
        ("mobilenet_v2", {"conv_stem.reduce_1x1.normalization.running_var": (16,)}),
        (
            "mobilenet_v2",
            {
                "layer.3.expand_1x1.convolution.weight": (192, 32, 1, 1),
                "layer.15.conv_3x3.convolution.weight": (960, 1, 3, 3),
            },
        ),
        ("mobilenet_v2", {"conv_1x1.convolution.weight": (1280, 320, 1, 1), "classifier.bias": (1001,)}),
    ):
        shapes = {name: tensor.shape for name, tensor in make_tensors(TRANSFORMERS, model, num_classes=1001)[2].items()}
        assert some.items() <= shapes.items()


def test_the_background_and_the_segmentation_of_transformers(tmp_path):
    _, flat, tensors = make_tensors(TRANSFORMERS, "mobilenet_v2", width=0.1, num_classes=1001)
    body = prefix(without(tensors, "classifier"), "mobilenet_v2.")
    head = {name: tensors[name] for name in ("classifier.weight", "classifier.bias")}
    labels = {str(i): "background" if i == 0 else f"class {i}" for i in range(1001)}
    folder = write_folder(tmp_path / "w", {**body, **head}, {"model_type": "mobilenet_v2", "id2label": labels})
    model, variables, card = load_weights(folder)
    assert model.spec.num_classes == 1000
    assert card["class_names"] == [f"class {i}" for i in range(1, 1001)]
    kernel = flat["params", "classifier", "kernel"]
    np.testing.assert_array_equal(variables["params"]["classifier"]["kernel"], kernel[:, 1:])
    head = {"segmentation_head.conv_pool.convolution.weight": np.ones((256, 32, 1, 1), "f4")}
    head |= {"segmentation_head.classifier.convolution.bias": np.ones(21, "f4")}
    config = {"model_type": "mobilenet_v2", "output_stride": 8, "id2label": {"0": "LABEL_0"}}
    model, variables, card = load_weights(write_folder(tmp_path / "w", {**body, **head}, config))
    assert (model.spec.num_classes, card["class_names"]) == (0, None)
    assert [row.dilation for row in model.spec.blocks if row.dilation > 1][:2] == [2, 2]
    assert card["notes"][0].startswith("the segmentation head was left out: segmentation_head.classifier")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "resnet"}, "its model_type is 'resnet'; valid: mobilenet_v1, mobilenet_v2"),
        ({"model_type": "mobilenet_v2", "hidden_act": "gelu"}, "its hidden_act is 'gelu'; valid: relu6, relu"),
        ({"model_type": "mobilenet_v2", "id2label": {"0": 7}}, "its class names are no list of text"),
        ({"model_type": "mobilenet_v2", "id2label": [1]}, "cannot be used"),
        ({"model_type": "mobilenet_v2", "layer_norm_eps": "x"}, "cannot be used"),
        ({"model_type": "mobilenet_v2", "first_layer_is_expansion": False}, "its first_layer_is_expansion is False; v"),
        ({"model_type": "mobilenet_v2", "expand_ratio": 4}, "its expand_ratio is 4; valid: 6"),
        (
            {"model_type": "mobilenet_v2", "depth_multiplier": 0.5, "finegrained_output": False},
            "its finegrained_output is False; valid: True",
        ),
        ({"architecture": "mobilenetv2_025"}, "is not timm's: 'pretrained_cfg' is missing"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, config, message):
    with pytest.raises(WeightsError, match=f"the config.json of .*{message}"):
        load_weights(write_folder(tmp_path / "w", {"a": np.ones(1, "f4")}, config))
    for text in ("[", "[]", "[" * 100_000):
        (tmp_path / "w" / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"the config\.json of .* is no JSON"):
            load_weights(tmp_path / "w")


@pytest.mark.parametrize(
    "processor",
    [
        {"crop_size": {"height": 0, "width": 0}},
        {"size": {"shortest_edge": 0}},
        {"rescale_factor": 0},
        {"image_std": [0, 1, 1]},
        {"image_mean": "x"},
        {"resample": 1},
        {"size": [1]},
    ],
)
def test_a_preprocessor_that_cannot_be_is_refused(tmp_path, processor):
    config = {"model_type": "mobilenet_v2"}
    with pytest.raises(WeightsError, match=r"the config\.json of .* (cannot be used|is not)"):
        load_weights(write_folder(tmp_path / "w", {"a": np.ones(1, "f4")}, config, processor))


def test_a_saved_model_of_tensorflow_is_named(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(WeightsError, match=r"is a TensorFlow SavedModel; valid: the model saved as \.keras or \.h5"):
        load_weights(tmp_path)


# TensorFlow-Slim.


@pytest.mark.parametrize("model", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_a_frozen_graph_and_an_npz_of_slim(tmp_path, model):
    spec, flat, tensors = make_tensors(SLIM, model, width=0.25, num_classes=3)
    averages = {f"{name}/ExponentialMovingAverage": t for name, t in tensors.items() if "moving" not in name}
    others = {"global_step": np.array(9), **{f"{name}/RMSProp": t * 0 for name, t in tensors.items()}}
    zeros = {name: t * 0 for name, t in tensors.items() if "moving" not in name}
    np.savez(tmp_path / "w.npz", **{**tensors, **others, **averages, **zeros})  # pyright: ignore
    for path in (write_graph(tmp_path / "frozen.pb", tensors), tmp_path / "w.npz"):
        found, variables, card = load_weights(path)
        assert found.spec == spec
        assert_holds(variables, flat)
        assert card["name"] == f"slim/{model}"
    assert "averaged weights ExponentialMovingAverage" in card["notes"][0]
    _, variables, _ = load_weights(tmp_path / "w.npz", select="variables")
    assert not variables["params"]["stem"]["conv"]["kernel"].any()


def test_names_of_slim():
    # tensorflow/models research/slim; the conversion scripts of transformers list the same names
    for model, some in (
        ("mobilenet_v1", {"MobilenetV1/Conv2d_0/weights": (3, 3, 3, 32)}),
        ("mobilenet_v1", {"MobilenetV1/Conv2d_13_depthwise/depthwise_weights": (3, 3, 1024, 1)}),
        ("mobilenet_v1", {"MobilenetV1/Logits/Conv2d_1c_1x1/biases": (1001,)}),
        ("mobilenet_v2", {"MobilenetV2/expanded_conv/depthwise/BatchNorm/moving_variance": (32,)}),
        ("mobilenet_v2", {"MobilenetV2/expanded_conv_16/project/weights": (1, 1, 960, 320)}),
        ("mobilenet_v2", {"MobilenetV2/Logits/Conv2d_1c_1x1/weights": (1, 1, 1280, 1001)}),
        ("mobilenet_v3_small", {"MobilenetV3/expanded_conv/squeeze_excite/Conv/weights": (1, 1, 16, 8)}),
    ):
        shapes = {name: tensor.shape for name, tensor in make_tensors(SLIM, model, num_classes=1001)[2].items()}
        assert some.items() <= shapes.items()


def test_graphs_of_something_else_are_refused(tmp_path):
    path, one = tmp_path / "w.pb", np.ones((2, 2), "<f4")
    whole = encode_constant("a/weights", one)
    for content, message in (
        (whole[:-3], "is cut off"),
        (encode(1, encode(1, b"x") + encode(2, b"Placeholder")), "no constants that are weights; its nodes: x"),
        (encode_constant("a/weights", one, kind=12), "has the data type 12, perhaps quantised"),
        (encode_constant("a/weights", one, numbers=b"\0" * 12), r"of shape \[2, 2\] has 3 numbers"),
        (b"\x0a\x02\x0b\x01", "no protocol buffer"),
        (b"\x0a" + b"\xff" * 12, "cut off, or it is no protocol buffer"),
        (b"\x0a\0" * 2_100_000, "more than 200,000 nodes"),
        (encode_constant("a/weights", np.ones((2,) * 9, "<f4")), "has 9 axes"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            load_weights(path)
    # One number stands for all of a constant, whatever its shape says.
    large = encode(2, encode(1, 1 << 40)) * 2
    value = encode(8, encode(1, 1) + encode(2, large) + encode(5, b"\0\0\x80\x3f"))
    node = (
        encode(1, b"MobilenetV1/Conv2d_0/weights")
        + encode(2, b"Const")
        + encode(5, encode(1, b"value") + encode(2, value))
    )
    path.write_bytes(encode(1, node))
    with pytest.raises(WeightsError, match="is larger than any of a MobileNet"):
        load_weights(path)


def test_an_npz_that_lies_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    for array, message in ((np.array([{}]), "or of objects"), (np.ones((1 << 20, 0), "f4"), "holds no MobileNet")):
        np.savez(path, a=array)
        with pytest.raises(WeightsError, match=message):
            load_weights(path)
    np.savez(path, a=np.ones((3, 4), "f4"))
    data = path.read_bytes()
    assert data.count(b"(3, 4)") == 1
    with zipfile.ZipFile(path) as archive:
        content = archive.read("a.npy").replace(b"(3, 4)", b"(9, 9)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(WeightsError, match=r"its array a of shape \[9, 9\] is larger than the file"):
        load_weights(path)


# Files that are something else, and names that are an attack.


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x1c\0\0\0TFL3" + bytes(99), "a TensorFlow Lite model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b" <!DOCTYPE HTML><html>", "a web page"),
        (b"\x1f\x8b" + bytes(99), "a gzip archive"),
        (b"a" * 257 + b"ustar" + bytes(99), "a tar archive"),
        (b"\x93NUMPY\x01\0", "a single NumPy array"),
        (b"", "it is empty"),
        (bytes(4096), "it begins with zeros"),
        (b'{"a": 1}', "a JSON file"),
    ],
)
def test_what_a_file_is_is_said(tmp_path, content, what):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=f"w.pth cannot be read: it .*{what}|w.pth cannot be read: {what}"):
        load_weights(tmp_path / "w.pth")


def test_names_reach_the_terminal_short_and_escaped(torchvision, tmp_path):
    evil = "\x1b[2J\x1b]0;title\x07" + "x" * 7_000_000
    for name in (evil, f"features.{evil}", f"{evil}features.0.0.weight"):
        save_file({**torchvision[2], name: np.ones(1, "f4")}, tmp_path / "w.safetensors")
        with pytest.raises(WeightsError) as caught:
            load_weights(tmp_path / "w.safetensors")
        assert len(str(caught.value)) < 2100
        assert str(caught.value).isprintable()
    _, _, card = load_weights(prefix(torchvision[2], "\x1b[2J" * 99 + "."))
    assert all(note.isprintable() and len(note) < 500 for note in card["notes"])


def test_files_made_to_have_many_networks_or_long_places_take_bounded_time(torchvision):
    stem, begun = "features.0.0.weight", time.process_time()
    many = {f"{'ema' if i == 0 else i}.{stem}": np.ones(1, "f4") for i in range(40_000)}
    with pytest.raises(WeightsError, match="the dict holds 40,000 networks; valid: at most 100"):
        load_weights(many)
    long = {"x" * 1_000_000: {str(i): {"a": np.ones(1, "f4")} for i in range(20_000)}}
    with pytest.raises(WeightsError, match="the dict holds no MobileNet"):
        load_weights(long)
    assert time.process_time() - begun < 10
