import itertools
import json
import logging
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.mutate import FILES, mutate, read_weights, try_file
from benchmarks.parity import LIMIT, compare_case
from benchmarks.strangers import write_forms
from mobilenet_jax.models.init import init_variables, variable_shapes
from mobilenet_jax.models.network import create_model
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError, load
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights

QUICK = ("keras_v2_035", "torchvision_v3_small_100")  # a minute for all, most of it compilation
CASES = (
    "keras_v1_025",
    "keras_v2_035",
    "keras_v3_large_075",
    "keras_v3_small_100",
    "keras_v3_small_minimalistic",
    "timm_tf_v3_small_minimal_100",
    "timm_v1_100",
    "timm_v2_050",
    "timm_v3_small_050",
    "timm_v4_conv_small",
    "timm_v4_conv_small_035",
    "timm_v4_hybrid_medium",
    "torchvision_v2_035",
    "torchvision_v2_100",
    "torchvision_v3_large_050",
    "torchvision_v3_small_100",
)


def flatten(variables) -> dict[str, np.ndarray]:
    paths = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def assert_same(left, right) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def change(tmp_path: Path, source: Path, **tensors: np.ndarray | None) -> Path:
    """A copy of a safetensors file with tensors replaced, or taken out where they are None."""
    changed = {**load_file(source), **tensors}
    path = tmp_path / "changed.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    return path


# What other frameworks answer.


# Even sizes tell TensorFlow's padding from PyTorch's, odd ones Keras' V1 from both; benchmarks/parity.py has all pairs.
@pytest.mark.parametrize(
    ("case", "file", "lowering"),
    [
        *itertools.product(CASES, ("case.npz", "case_odd.npz"), ("plain",)),
        *(
            pytest.param(case, "case_rect.npz", "auto", marks=() if case in QUICK else pytest.mark.slow)
            for case in CASES
        ),
    ],
)
def test_trap_05_logits_and_features_are_the_frameworks_own(reference, request, case, file, lowering):
    if lowering == "auto":  # what users run; the textbook form has the same numbers without LLVM's optimizations
        request.getfixturevalue("optimized")
    differences = compare_case(reference / "fixtures" / case, file, lowering=lowering)
    assert len(differences) >= 6
    assert max(differences.values()) <= LIMIT, differences


@pytest.mark.parametrize("case", ["torchvision_v2_035", "keras_v1_025", "keras_v2_035"])
def test_all_files_of_a_case_give_the_same_variables(reference, case):
    folder = reference / "fixtures" / case
    files = list(json.loads((folder / "meta.json").read_text())["weights"])
    assert len(files) > 1
    first, *others = (load_weights(folder / file) for file in files)
    for model, variables, card in others:
        assert_same(variables, first[1])
        assert (model, card["name"]) == (first[0], first[2]["name"])


@pytest.mark.parametrize("case", CASES)
def test_the_network_is_read_off_the_tensors_or_its_candidates_are_named(reference, case):
    meta = json.loads((reference / "fixtures" / case / "meta.json").read_text())
    path, full = reference / "fixtures" / case / next(iter(meta["weights"])), f"{meta['framework']}/{meta['name']}"
    if case == "timm_v3_small_050":
        with pytest.raises(
            WeightsError, match=r"timm/mobilenetv3_small_050 or timm/tf_mobilenetv3_small_050: .* padding"
        ):
            load_weights(path)
        return
    model, variables, card = load_weights(path)
    assert (card["name"], card["width"], model.spec.num_classes) == (full, meta["width"], 10)
    assert model.spec.bn_epsilon == meta["bn"]["eps"]
    assert sum(leaf.size for leaf in flatten(variables["params"]).values()) == meta["trainable_params"]
    assert sum(leaf.size for leaf in flatten(variables["batch_stats"]).values()) == meta["bn_statistics"]
    assert card["source"] == {"file": path.name, "sha256": meta["weights"][path.name]["sha256"]}
    assert card["class_names"] is None
    assert (
        card["spec"]
        == to_json(model.spec)
        == to_json(make_spec(card["model"], width=card["width"], num_classes=10, convention=card["convention"]))
    )


def test_torchvisions_weights_of_imagenet_load_with_their_card(reference):
    model, variables, card = load_weights(reference / "weights" / "mobilenet_v2-b0353104.pth")
    assert card["name"] == "torchvision/mobilenet_v2"
    assert card["class_names"][285] == "Egyptian cat"
    assert card["preprocessing"] == {
        "image_size": 224,
        "crop_share": 0.875,
        "interpolation": "bilinear",
        "squash": False,
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
    }
    assert card["source"]["sha256"].startswith("b0353104")
    variances = [leaf for name, leaf in flatten(variables).items() if name.endswith("norm/var")]
    # reference/frameworks.md: why the epsilon is part of the weights
    assert sum((leaf < 1e-3).sum() for leaf in variances) == 5527
    assert model.spec.bn_epsilon == 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("timm", "torchvision"))])
def test_trap_24_preprocessing_is_that_of_published_weights(reference, case):
    folder = reference / "fixtures" / case
    meta = json.loads((folder / "meta.json").read_text())
    _, _, card = load_weights(folder / next(iter(meta["weights"])), f"{meta['framework']}/{meta['name']}")
    given = card["preprocessing"]
    published = [
        {
            "image_size": tag["center_crop"] if "center_crop" in tag else tag["input_size"][-1],
            "crop_share": tag["center_crop"] / tag["resize_shorter_side"] if "center_crop" in tag else tag["crop_pct"],
            "interpolation": tag["interpolation"],
            "squash": False,
            "mean": pytest.approx([255 * x for x in tag["mean"]]),
            "std": pytest.approx([255 * x for x in tag["std"]]),
        }
        for tag in meta["preprocessing_of_pretrained_weights"].values()
    ]
    assert given in published


def test_lowering_and_dtype_are_those_asked_for(reference):
    path = reference / "fixtures" / "torchvision_v2_035" / "weights.pth"
    model, variables, _ = load_weights(path, lowering="plain", dtype="bfloat16")
    assert (model.lowering, model.dtype) == ("plain", "bfloat16")
    assert {leaf.dtype.name for leaf in flatten(variables).values()} == {"float32"}


# Files written here: every model of every framework, at widths nobody publishes.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A torchvision V2 of width 0.25 with 7 classes: (path, model, variables, card)."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


def write_tiny(path: Path, *, classes: int = 7, name: str = "mobilenet_v2", width: float = 0.25):
    model = create_model(name, width=width, num_classes=classes, convention="torchvision")
    variables = init_variables(model, seed=0)
    card = {
        "name": "torchvision/mobilenet_v2",
        "model": name,
        "width": width,
        "convention": "torchvision",
        "preprocessing": asdict(HALF),
        "class_names": None,
        "source": {},
        "metrics": {},
        "notes": [],
    }
    beside = save_weights(path, model, variables, card, format="torchvision")
    assert beside is not None
    beside.unlink()  # as a file of the framework's own
    return path, model, variables, card


def test_a_width_that_nobody_publishes_is_found(tmp_path):
    for width in (0.1, 0.62, 1.7):
        path, model, variables, _ = write_tiny(tmp_path / "odd.safetensors", width=width)
        found, loaded, card = load_weights(path)
        assert found == model
        assert card["width"] == pytest.approx(width, abs=0.02)
        assert_same(loaded, variables)


def test_every_tensor_is_used_and_every_variable_filled(tiny, tmp_path):
    path = tiny[0]
    for tensors, message in (
        ({"features.18.1.running_var": None}, r"torchvision/mobilenet_v2: it lacks features\.18\.1\.running_var$"),
        (
            {"features.19.0.weight": np.zeros(3, np.float32)},
            r"it has unknown features\.19\.0\.weight; without the layers behind the",
        ),
        (
            {"features.1.conv.0.0.weight": np.zeros((8, 2, 3, 3), np.float32)},
            r"of another shape are features\.1\.conv\.0\.0\.weight \[8, 2, 3, 3\] \(valid: \[8, 1, 3, 3\]\)$",
        ),
        ({"classifier.1.bias": None}, r"it lacks classifier\.1\.bias; without the layers behind"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(change(tmp_path, path, **tensors))


def test_values_that_cannot_be_weights_are_refused(tiny, tmp_path):
    path = tiny[0]
    for name, value, message in (
        ("features.0.1.bias", np.full(8, np.nan, np.float32), "not finite"),
        ("features.0.1.bias", np.full(8, 1e300), "not finite"),
        ("features.0.1.running_var", np.full(8, -1, np.float32), "a variance below 0"),
        ("features.0.1.bias", np.zeros(8, np.int32), "is int32; valid: float16"),
    ):
        with pytest.raises(WeightsError, match=rf"{re.escape(name)} of .* {message}|{message}"):
            load_weights(change(tmp_path, path, **{name: value}))


def test_half_precision_and_double_become_float32(tiny, tmp_path):
    path = tiny[0]
    bias = np.linspace(0, 1, 8)
    for dtype in (np.float16, np.float64):
        _, loaded, _ = load_weights(change(tmp_path, path, **{"features.0.1.bias": bias.astype(dtype)}))
        found = loaded["params"]["stem"]["norm"]["bias"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, bias.astype(dtype).astype(np.float32))


def test_trap_26_a_background_class_is_dropped_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="absl")
    path, _, variables, _ = write_tiny(tmp_path / "w.safetensors", classes=1001)
    model, loaded, card = load_weights(path)
    assert model.spec.num_classes == 1000
    assert card["spec"]["num_classes"] == len(card["class_names"]) == 1000
    assert card["notes"] == ["class 0 of 1001, the background, was dropped"]
    assert "the background, was dropped" in caplog.text
    kernel = variables["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(loaded["params"]["classifier"]["kernel"], kernel[:, 1:])


def test_a_file_without_a_classifier_is_a_network_without_one(tiny, tmp_path):
    path, _, variables, _ = tiny
    without = change(tmp_path, path, **{"classifier.1.weight": None, "classifier.1.bias": None})
    model, loaded, _ = load_weights(without)
    assert model.spec.num_classes == 0
    assert flatten(loaded).keys() == {"/".join(path) for path in variable_shapes(model.spec)}
    np.testing.assert_array_equal(
        loaded["params"]["head"]["conv"]["kernel"], variables["params"]["head"]["conv"]["kernel"]
    )


def test_names_are_checked_against_the_tensors(tiny, reference):
    path = tiny[0]
    for name, message in (
        ("torchvision/mobilenet_v3_small", r"does not fit torchvision/mobilenet_v3_small: it lacks"),
        ("timm/mobilenetv2_025", "does not fit timm/mobilenetv2_025: it lacks"),
        (
            "timm/mobilenetv9_100",
            "timm has no model 'mobilenetv9_100'; valid: timm/mobilenetv1_100",
        ),
        ("mobilenet_v2", "valid: FRAMEWORK/MODEL, the framework of torchvision, timm, keras, transformers, slim"),
        ("caffe/mobilenet_v2", "valid: FRAMEWORK/MODEL"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(path, name)
    timm = reference / "fixtures" / "timm_v2_050" / "weights.safetensors"
    with pytest.raises(WeightsError, match=r"does not fit timm/mobilenetv2_100: .*of another shape are"):
        load_weights(timm, "timm/mobilenetv2_100.ra_in1k")


def test_tensors_of_no_mobilenet_are_named(tmp_path):
    save_file({"encoder.0.weight": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsError,
        match=r"no MobileNet of torchvision, timm, keras, transformers, slim; its tensors: encoder\.0\.weight",
    ):
        load_weights(tmp_path / "w.safetensors")


# Our own files.


def test_our_own_file_needs_no_name_and_keeps_everything(tiny, tmp_path):
    _, model, variables, card = tiny
    card = {**card, "class_names": list("abcdefg"), "metrics": {"eval/top1": 0.5}}
    path = tmp_path / "ours.safetensors"
    save_weights(path, model, variables, card)
    found, loaded, read = load_weights(path)
    assert found == model
    assert_same(loaded, variables)
    assert read == json.loads(json.dumps({**card, "spec": to_json(model.spec)}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("spec", {}, "holds no network: it has no list of rows"),
        ("spec", None, "has no valid 'spec'"),
        ("class_names", ["a"], "has 1 class names for 7 classes"),
        ("width", "wide", "has no valid 'width'"),
    ],
)
def test_a_card_that_is_none_is_refused(tiny, tmp_path, key, value, message):
    _, model, variables, card = tiny
    path = tmp_path / "ours.safetensors"
    save_weights(path, model, variables, card)
    card = {**card, "spec": to_json(model.spec), key: value}
    save_file(load_file(path), path, {load.CARD_KEY: json.dumps(card)})
    with pytest.raises(WeightsError, match=f"the card of .*ours.safetensors {message}"):
        load_weights(path)


def test_a_card_of_another_network_is_refused(tiny, tmp_path):
    _, model, variables, card = tiny
    path = tmp_path / "ours.safetensors"
    save_weights(path, model, variables, card)
    card = {**card, "spec": to_json(make_spec("mobilenet_v2", width=0.35, num_classes=7))}
    save_file(load_file(path), path, {load.CARD_KEY: json.dumps(card)})
    with pytest.raises(WeightsError, match="does not fit the network of its card: of another shape are params/stem"):
        load_weights(path)
    save_file(load_file(path), path, {load.CARD_KEY: "{" * 100_000})
    with pytest.raises(WeightsError, match="is no JSON"):
        load_weights(path)


# Files that are none.


def test_what_is_not_there_is_said_with_what_would_be_valid(tmp_path):
    for path in (tmp_path / "nothing.pth", "nothing"):
        with pytest.raises(
            FileNotFoundError, match=r"there are no weights .*nothing.*; valid: a file, the workdir of a run"
        ):
            load_weights(path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        load_weights(tmp_path)
    (tmp_path / "w.ckpt").write_text("#" * 9)
    with pytest.raises(WeightsError, match=r"has no known format; valid: files of torch\.save, safetensors"):
        load_weights(tmp_path / "w.ckpt")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "h5", "keras"])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"PK\x03\x04" + b"\0" * 64, b"\xff" * 1000, b"<html></html>"])
def test_a_file_of_another_kind_is_one_sentence(tmp_path, suffix, content):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"w.{suffix} cannot be read") as caught:
        load_weights(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "h5", "keras"])
def test_an_oversized_file_is_refused_before_it_is_read(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: no bytes on the disk
    with pytest.raises(WeightsError, match="1,099,511,627,776 bytes; no MobileNet has more"):
        load_weights(path)


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for length in (1 << 20, 1 << 62):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(WeightsError, match=r"header of .* bytes is larger than"):
            load_weights(path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(path)


@pytest.mark.parametrize("file", [*FILES, "ours.safetensors"])
def test_mutated_files_load_or_are_refused_in_a_sentence(reference, tiny, tmp_path, file):
    source = reference / "fixtures" / file
    if file.startswith("ours"):
        source = tmp_path / file
        save_weights(source, *tiny[1:])
    data, path = source.read_bytes(), tmp_path / f"mutated{source.suffix}"
    outcomes = []
    count = 25 if source.suffix in (".pth", ".safetensors") else 10  # HDF5 is read in a process of its own
    for i in range(count):
        path.write_bytes(mutate(data, random.Random(f"{file} {i}")))
        outcomes.append(try_file(path))
    assert outcomes.count("refused") > count / 3


def test_mutated_forms_load_or_are_refused_in_a_sentence(tmp_path):
    """A few of each; benchmarks/mutate.py makes thousands."""
    outcomes = []
    for source in write_forms(tmp_path):
        data, count = source.read_bytes(), 1 if source.suffix == ".h5" else 4
        for i in range(count):
            source.write_bytes(mutate(data, random.Random(f"{source.name} {i}")))
            outcomes.append(try_file(source, read_weights))
        source.write_bytes(data)
        assert try_file(source, read_weights) == "loaded"
    assert outcomes.count("refused") > len(outcomes) / 3


def test_nothing_is_read_as_a_run_that_is_damaged(tmp_path):
    shutil.copytree(Path(__file__).parent, tmp_path / "checkpoints" / "7")
    with pytest.raises((WeightsError, FileNotFoundError), match=r"damaged|no finished checkpoint"):
        load_weights(tmp_path)
