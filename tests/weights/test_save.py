import json
import os
import stat
from dataclasses import asdict

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.load import load_weights, read_tensors
from mobilenet_jax.weights.save import save_weights


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "case",
    ["torchvision_v2_035", "torchvision_v3_large_050", "timm_v3_small_050", "timm_v4_hybrid_medium"],
)
def test_export_gives_back_the_frameworks_file(reference, tmp_path, case, suffix):
    folder = reference / "fixtures" / case
    meta = json.loads((folder / "meta.json").read_text())
    source, name = folder / next(iter(meta["weights"])), f"{meta['framework']}/{meta['name']}"
    path = tmp_path / f"w.{suffix}"
    save_weights(path, *load_weights(source, name), format=meta["framework"])
    expected, found = read_tensors(source)[0], read_tensors(path)[0]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].shape, found[key].dtype.kind) == (tensor.shape, tensor.dtype.kind)
        if "num_batches_tracked" not in key:  # a count that inference does not have
            np.testing.assert_array_equal(found[key], tensor.astype(np.float32))


@pytest.fixture(scope="module")
def tiny():
    """(model, variables, card) of torchvision's V2 at width 0.25."""
    model = create_model("mobilenet_v2", width=0.25, num_classes=3, convention="torchvision")
    card = {
        "name": "mine",
        "model": "mobilenet_v2",
        "width": 0.25,
        "convention": "torchvision",
        "preprocessing": asdict(HALF),
        "class_names": ["a", "b", "c"],
        "source": {},
        "metrics": {},
        "notes": [],
    }
    return model, init_variables(model, seed=1), card


def test_the_same_weights_are_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", *tiny)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["mobilenet_jax_card"])["class_names"] == ["a", "b", "c"]
    assert "params/block_03/expand/conv/kernel" in load_file(tmp_path / "a.safetensors")


def test_a_write_that_fails_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, *tiny)
    before = path.read_bytes()

    def fail(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_weights(path, *tiny)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_what_a_framework_cannot_hold_is_said(tiny, tmp_path):
    model, variables, card = tiny
    path = tmp_path / "w.safetensors"
    relu = create_model("mobilenet_v2", width=0.25, num_classes=3, convention="torchvision", activation="relu")
    keras = create_model("mobilenet_v2", width=0.25, num_classes=3, convention="keras")
    trained = create_model("mobilenet_v2", width=0.25, num_classes=3, convention="torchvision", bn_decay=0.5, dropout=0)
    for arguments, message in (
        ((relu, variables, card), "torchvision's mobilenet_v2 is another network than this one: its rows differ"),
        ((keras, variables, card), "its padding, bn_epsilon differ"),
        (
            (keras, variables, {**card, "convention": "keras"}),
            "torchvision has no mobilenet_v2 of convention keras; valid",
        ),
        ((model, variables, {**card, "class_names": ["a"]}), "1 class names for 3 classes"),
        (
            (model, {"params": variables["params"]}, card),
            "the variables do not fit the model: it lacks batch_stats/stem",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            save_weights(path, *arguments, format="torchvision")
    with pytest.raises(WeightsError, match=r"w\.pth cannot be of format safetensors; valid suffixes: \.safetensors$"):
        save_weights(tmp_path / "w.pth", *tiny)
    with pytest.raises(ValueError, match="format is 'onnx'; valid: safetensors, torchvision, timm"):
        save_weights(path, *tiny, format="onnx")
    assert not path.exists()
    save_weights(path, trained, variables, card, format="torchvision")  # training's options are not the network's


def test_the_card_lies_beside_a_file_that_cannot_hold_it(tiny, tmp_path):
    model, variables, card = tiny
    path, card = tmp_path / "w.pth", {**card, "metrics": {"eval/top1": 0.5}}
    beside = save_weights(path, model, variables, card, format="torchvision")
    assert beside is not None
    assert beside == tmp_path / "w.pth.card.json"
    found, loaded, read = load_weights(path)
    assert found == model
    np.testing.assert_array_equal(
        loaded["params"]["classifier"]["kernel"], np.asarray(variables["params"]["classifier"]["kernel"])
    )
    for key in ("name", "class_names", "preprocessing", "metrics"):
        assert read[key] == json.loads(json.dumps(card[key]))
    _, _, named = load_weights(path, "torchvision/mobilenet_v2")  # the name decides the network, the card the rest
    assert (named["name"], named["class_names"]) == ("torchvision/mobilenet_v2", card["class_names"])
    assert load_weights(path, classifier="drop")[0].spec.num_classes == 0
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(
        WeightsError, match=r"w\.pth\.card\.json was not written for the w\.pth beside it; delete it, or"
    ):
        load_weights(path)
    for text in ("{", "[]", "[" * 100_000, '{"spec": 1}'):
        beside.write_text(text)
        with pytest.raises(WeightsError, match=r"w\.pth\.card\.json (is no JSON|was not written for)"):
            load_weights(path)
    assert save_weights(tmp_path / "w.safetensors", *tiny) is None


def test_a_card_beside_of_another_network_is_refused(tiny, tmp_path):
    path = tmp_path / "w.pth"
    beside = save_weights(path, *tiny, format="torchvision")
    assert beside is not None
    written = json.loads(beside.read_text())
    for changed, message in (
        (
            {"spec": to_json(make_spec("mobilenet_v2", width=0.5, num_classes=3))},
            "does not fit the network of the card",
        ),
        ({"class_names": ["a"]}, "has 1 class names for 3 classes"),
    ):
        beside.write_text(json.dumps({**written, **changed}))
        with pytest.raises(WeightsError, match=message):
            load_weights(path)
