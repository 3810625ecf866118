"""Weights become files that answer as the weights do, with a contract, and nothing is written if they do not."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.export_table import draw_variables
from benchmarks.strangers import write_forms
from mobilenet_jax import export_weights
from mobilenet_jax.exporting import contract, export, runtime, tflite_metadata
from mobilenet_jax.exporting.contract import read_exported
from mobilenet_jax.inference.predict import predict
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec, SqueezeExcite
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.weights import WeightsError

FORMATS = ("tflite", "onnx", "stablehlo")


@pytest.fixture(scope="module")
def weights(tiny_weights):
    """(model, variables, card) of three rows with three named classes."""
    rows = (InvertedResidual(filters=8, expanded=16, activation="relu6", se=SqueezeExcite()),)
    spec = Spec(name="tiny", stem=Conv(filters=8, stride=2), blocks=rows, head=None, num_classes=3)
    return MobileNet(spec), draw_variables(spec), {**tiny_weights[2], "spec": to_json(spec)}


@pytest.fixture(scope="module")
def exports(weights, tmp_path_factory):
    """{format: (report, file)} of the small network; the .onnx file takes pixels."""
    found = {}
    for kind in FORMATS:
        folder = tmp_path_factory.mktemp(kind)
        report = export_weights(weights, format=kind, out=folder, preprocess=kind == "onnx")
        found[kind] = report, folder / f"tiny.{kind}"
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_a_report_says_how_near_the_file_is(exports, kind):
    report, path = exports[kind]
    assert report == json.loads((path.parent / "report.json").read_text())
    assert report["max_difference"] < 1e-5
    assert 0 < report["mean_difference"] <= report["max_difference"]
    assert report["top1_agreement"] == 1
    assert (report["bytes"], report["file"]) == (path.stat().st_size, str(path))
    assert report["delegates"] == (1 if kind == "tflite" else None)
    assert {name: sorted(times) for name, times in report["latency_ms"].items()} == {
        "1 thread": sorted([kind, "jax"]),
        "2 threads": sorted([kind, "jax"]),
    }
    count = {"CONV_2D": 5, "DEPTHWISE_CONV_2D": 1} if kind == "tflite" else {"Conv": 7}  # one normalises the pixels
    if kind != "stablehlo":
        assert {name: report["operations"][name] for name in count} == count


def test_the_contract_is_in_the_file_and_beside_it(exports, weights):
    for kind, shape, name in (("tflite", [1, 32, 32, 3], "images"), ("onnx", [None, 32, 32, 3], "pixels")):
        path = exports[kind][1]
        exported = read_exported(path)
        assert exported.contract == json.loads(path.with_suffix(".json").read_text())
        assert (exported.contract["input"]["name"], exported.contract["input"]["shape"]) == (name, shape)
        assert exported.spec == weights[0].spec
        assert exported.card["class_names"] == ["red", "green", "blue"]
    assert read_exported(exports["tflite"][1]).card == weights[2]
    assert read_exported(exports["onnx"][1]).card["preprocessing"]["mean"] == [0.0] * 3


def test_labels_are_where_task_libraries_look(exports):
    path = exports["tflite"][1]
    with zipfile.ZipFile(path) as archive:
        assert archive.read(tflite_metadata.LABELS) == b"red\ngreen\nblue"
        assert archive.getinfo(tflite_metadata.LABELS).compress_type == zipfile.ZIP_STORED


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_a_file_predicts_what_its_weights_predict(exports, weights, tmp_path, write_images, kind):
    images = write_images(tmp_path, 3)
    wanted = list(predict(weights, images, top=2, batch_size=2))
    got = list(predict(read_exported(exports[kind][1]), images, top=2, batch_size=2))
    for ours, theirs in zip(wanted, got, strict=True):
        assert [(a.name, a.index) for a in ours.answers] == [(a.name, a.index) for a in theirs.answers]
        assert [a.probability for a in theirs.answers] == pytest.approx([a.probability for a in ours.answers], rel=1e-5)


def test_a_program_runs_without_this_package_or_flax(exports):
    code = """
import sys
for name in ("mobilenet_jax", "flax"):
    sys.modules[name] = None
import numpy as np
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print(program.platforms, program.call(np.zeros((2, 32, 32, 3), np.float32)).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, exports["stablehlo"][1]], capture_output=True, text=True, check=True
    )
    platforms, logits = done.stdout.split(") ")
    assert platforms == "('cpu', 'cuda', 'tpu'"
    zeros = runtime.TFLiteRuntime(exports["tflite"][1].read_bytes())(np.zeros((2, 32, 32, 3), np.float32))
    np.testing.assert_allclose(json.loads(logits), zeros, rtol=1e-4, atol=1e-6)


def test_a_file_that_differs_is_not_written(weights, tmp_path, monkeypatch):
    read = export.read_weights

    def spoil(graph, variables):
        weights = read(graph, variables)
        pair = weights["classifier"]
        return {**weights, "classifier": pair._replace(bias=pair.bias + np.array([0, 0.01, 0], np.float32))}

    monkeypatch.setattr(export, "read_weights", spoil)
    with pytest.raises(export.ParityError, match=r"differs from the network by .* nothing was written"):
        export_weights(weights, format="tflite", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tflite", "onnx"])
def test_damaged_files_are_refused_in_one_sentence(exports, tmp_path, kind):
    data = exports[kind][1].read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f"damaged.{kind}"
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed if rng.random() < 0.8 else data[: rng.integers(len(data))])
        with pytest.raises(WeightsError, match=r"damaged|has no contract") as refused:
            read_exported(path)
        assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_a_runtime_refuses_is_one_sentence(exports):
    exported = read_exported(exports["onnx"][1])
    for kind in ("tflite", "onnx"):
        with pytest.raises(WeightsError, match=f"the .{kind} file of tiny cannot be run: ") as refused:
            runtime.open_classifier(replace(exported, data=b"no model" * 100, kind=kind))
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "coreml"}, "format is 'coreml'; valid: tflite, onnx, stablehlo, web"),
        ({"quantize": "int4"}, "quantize is 'int4'; valid: none, int8, float16"),
        ({"quantize": "int8"}, "quantize int8 needs calibration"),
        ({"per_tensor": True}, "per_tensor and float_ends are for quantize int8"),
        ({"batch": 0}, "batch is 0; valid: 1 or more, or dynamic"),
        ({"format": "stablehlo", "quantize": "float16"}, "quantize float16 is for the formats tflite and onnx"),
        ({"resolution": 0}, "image_size 0"),
        ({"calibration": "NOWHERE.py"}, "NOWHERE.py is not a file"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(weights, tmp_path, options, said):
    with pytest.raises(ValueError, match=said) as refused:
        export_weights(weights, **{"format": "tflite", "out": tmp_path / "out", **options})
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_without_the_extra_the_command_to_install_it_is_named(weights, monkeypatch, kind):
    module, package = export._PACKAGES[kind][0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(runtime.MissingPackageError, match=f'needs the package {package}; install it: pip .*"') as said:
        export_weights(weights, format=kind)
    assert len(str(said.value).splitlines()) == 1


def test_a_contract_is_found_by_its_key_alone():
    with pytest.raises(ValueError, match="not found"):
        contract.seal(b"no contract")


def test_weights_of_another_framework_have_no_ranges_of_a_run(tmp_path):
    write_forms(tmp_path)
    with pytest.raises(ValueError, match="calibration"):
        export_weights(tmp_path / "hub", format="tflite", quantize="int8", out=tmp_path / "out")
    with pytest.raises(WeightsError, match="state_dict"):
        export_weights(tmp_path / "checkpoint.pth.tar", format="tflite", select="nothing", out=tmp_path / "out")


def test_weights_for_other_channels_are_not_exported(weights, tmp_path):
    model, variables, card = weights
    grey = MobileNet(replace(model.spec, in_channels=1))
    with pytest.raises(ValueError, match="take 1 channels; images have 3"):
        export_weights((grey, variables, card), format="tflite", out=tmp_path)
