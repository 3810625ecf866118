import copy
import json

import numpy as np
import pytest
from flax import traverse_util

from mobilenet_jax.diagnosis.activations import measure_activations
from mobilenet_jax.diagnosis.report import format_text, list_findings, make_report
from mobilenet_jax.diagnosis.weights import quantise_variables
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.weights.card import HALF
from tests.cards import make_test_card

METRICS = [{"step": i, "train/grad_norm": norm} for i, norm in ((10, 2.0), (20, 40.0), (30, 1.0))]


def make_weights(network, **planted) -> tuple:
    """Make (model, variables, card), with leaves changed by `block_00__depthwise__conv__kernel=(index, value)`."""
    model, variables = network
    leaves = {path: np.array(leaf) for path, leaf in traverse_util.flatten_dict(variables, sep="__").items()}
    for path, (index, value) in planted.items():
        leaves[path][index] = value
    card = make_test_card(model.spec, name="tiny run", source={"file": "tiny.safetensors", "sha256": "0" * 64})
    assert card["spec"] == to_json(model.spec)
    return model, traverse_util.unflatten_dict(leaves, sep="__"), card


@pytest.fixture(scope="module")
def planted(tiny) -> dict:
    """The report of a network with something to find for every finding."""
    weights = make_weights(
        tiny,
        params__block_00__depthwise__conv__kernel=((..., slice(3)), 0),
        params__block_01__depthwise__norm__scale=(5, 0),
        params__stem__norm__bias=(2, -100),
        params__block_00__expand__norm__bias=(7, 100),
        params__block_01__depthwise__norm__bias=(slice(30), -100),
        batch_stats__block_01__expand__norm__var=(4, 1e-9),
        params__block_02__depthwise__norm__scale=(1, 3000),
    )
    model, variables, _ = weights
    batch = {
        "images": np.random.default_rng(0).integers(256, size=(4, 16, 16, 3), dtype=np.uint8),
        "mask": np.array([True, True, True, False]),
    }
    kinds = {"per_tensor": False, "per_channel": True}
    quantised = {k: quantise_variables(model.spec, variables, per_channel=v) for k, v in kinds.items()}
    tally = measure_activations(model, variables, [batch], mean=HALF.mean, std=HALF.std, quantised=quantised)
    return make_report(weights, tally=tally, images="a test", metrics=METRICS)


def find(report: dict, start: str) -> str:
    (sentence,) = [sentence for sentence in report["findings"] if start in sentence]
    return sentence


def test_findings_name_the_planted_faults(planted):
    dead = find(planted, "depthwise filters are dead")
    assert dead.startswith(
        "4 of 68 depthwise filters are dead, below 1% of their layer's usual norm (3 by their weights"
    )
    assert "1 by the batch norm's scale" in dead
    assert "block_00/depthwise 3 of 24, block_01/depthwise 1 of 32" in dead
    # 30 and 1 channels by their bias, 3 by dead filters, and 1 whose input is the saturated channel.
    assert "35 channels are 0 in every pixel" in find(planted, "Zeros")
    assert "1 channels are 6 in every pixel" in find(planted, "Saturation")
    assert "block_01/expand 1 of 32. The smallest is 1.0e-09 in block_01/expand; that channel keeps" in find(
        planted, "variances"
    )
    assert "worst: block_02/depthwise" in find(planted, "int8")
    assert "11 living channels round to 0" in find(planted, "int8")
    answers = planted["quantisation"]
    assert answers["per_channel"]["kl"] < answers["per_tensor"]["kl"]
    assert f"(KL {answers['per_tensor']['kl']:.2g} nats); with one per channel" in find(planted, "int8")
    assert "largest 40 at step 20, last 1." in find(planted, "Gradient")
    assert "block_01" in find(planted, "fewest dimensions")


def test_lost_pixels_of_the_worst_layers_are_percentages(planted):
    report = copy.deepcopy(planted)
    units = [layer["activations"]["active_units"] for layer in report["layers"] if layer["activations"]]
    for i, found in enumerate(filter(None, units)):
        found["lost_pixels"] = (0.9999, 1.0, 0.00123, 0.0001)[i]
    (sentence,) = [sentence for sentence in list_findings(report) if "active units than dimensions" in sentence]
    assert sentence.endswith(
        "cannot be recovered: block_01/expand at 100% of the pixels, block_00/expand at 100% of the pixels, "
        "block_02/pointwise at 0.123% of the pixels."
    )


def test_report_is_json_of_the_documented_keys(planted):
    assert json.loads(json.dumps(planted, allow_nan=False)) == planted
    keys = "schema weights images dead_below findings layers bottlenecks quantisation grad_norm"
    assert planted.keys() == set(keys.split())
    assert planted["images"] == {"source": "a test", "count": 3}
    layer_keys = {
        "path",
        "kind",
        "activation",
        "channels",
        "dead_filters",
        "norm",
        "int8",
        "kernel_rank",
        "activations",
    }
    assert [layer["path"] for layer in planted["layers"]] == [
        "stem",
        *(f"block_{i:02d}/{name}" for i in (0, 1) for name in ("expand", "depthwise", "project")),
        "block_02/depthwise",
        "block_02/pointwise",
        "classifier",
    ]
    assert all(layer.keys() == layer_keys for layer in planted["layers"])
    assert [layer["activations"] is None for layer in planted["layers"]] == [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_a_report_on_weights_alone_has_no_measures_of_images(tiny):
    report = make_report(make_weights(tiny))
    assert report["images"] is report["bottlenecks"] is report["quantisation"] is report["grad_norm"] is None
    assert all(layer["activations"] is None for layer in report["layers"])
    assert report["findings"][0].startswith("No depthwise filter is dead: each of the 68")
    assert report["findings"][1].startswith("No batch-norm variance is below epsilon (0.001)")
    assert len(report["findings"]) == 3


def test_text_has_findings_first_and_a_line_a_layer(planted):
    text = format_text(planted)
    lines = text.splitlines()
    assert lines[0] == "tiny run, tiny.safetensors: 3 images of a test"
    assert [line.removeprefix("- ") for line in lines[2 : 2 + len(planted["findings"])]] == planted["findings"]
    (line,) = [line.split() for line in lines if line.startswith("block_00/depthwise")]
    assert line[:4] == ["block_00/depthwise", "24", "3", "0"]
    (line,) = [line.split() for line in lines if line.startswith("block_01/project")]
    assert float(line[8]) == pytest.approx(planted["bottlenecks"][1]["effective_rank"], abs=0.05)
