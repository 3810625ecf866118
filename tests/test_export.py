"""The export command: what it prints, writes and refuses, and its files in the other commands."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.export_table import draw_variables
from mobilenet_jax import export as command
from mobilenet_jax import export_weights
from mobilenet_jax import main as main_command
from mobilenet_jax import predict as predict_command
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.exporting import report
from mobilenet_jax.exporting.contract import read_exported
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, Spec
from mobilenet_jax.training import evaluate
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from tests.cards import make_test_card
from tests.inference.test_prediction import TORCHVISION

CONFIG = "configs/v2.py:digits"
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # absl's


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
    """Nothing of what the commands set for their process outlives the test."""
    for module in (command, predict_command):
        monkeypatch.setattr(module, "configure_memory", lambda folder: "")
    for module in (command, predict_command, main_command):
        monkeypatch.setattr(module, "show_own_messages", lambda: None)
    monkeypatch.setattr(main_command, "configure_jax", lambda flags: None)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A network of two convolutions for the ten digits."""
    spec = Spec(name="tiny", stem=Conv(filters=8, stride=2), blocks=(), head=Conv(filters=16, stride=2), num_classes=10)
    card = make_test_card(
        spec,
        name="digits/tiny",
        preprocessing=replace(HALF, image_size=16, crop_share=1.0),
        class_names=[str(digit) for digit in range(10)],
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, MobileNet(spec), draw_variables(spec), card)
    return path


@pytest.fixture(scope="module")
def exported(file, tmp_path_factory):
    """The folder of a .tflite file in float and in int8, and of an .onnx file that takes pixels."""
    folder = tmp_path_factory.mktemp("exports")
    assert command.main([f"--weights={file}", "--format=tflite", f"--out={folder}"]) == 0
    int8 = ["--quantize=int8", f"--calibration={CONFIG}"]
    assert command.main([f"--weights={file}", "--format=tflite", f"--out={folder / 'int8'}", *int8]) == 0
    assert command.main([f"--weights={file}", "--format=onnx", "--preprocess", f"--out={folder / 'onnx'}"]) == 0
    return folder


def test_the_files_of_an_export(exported):
    assert sorted(path.name for path in exported.iterdir() if path.is_file()) == [
        "digits_tiny.json",
        "digits_tiny.tflite",
        "report.json",
    ]
    assert sorted(path.name for path in (exported / "int8").iterdir()) == [
        "digits_tiny_int8.json",
        "digits_tiny_int8.tflite",
        "report.json",
    ]
    float_report, report = (json.loads((path / "report.json").read_text()) for path in (exported, exported / "int8"))
    assert report["images"]["source"] == f"training images of {CONFIG}"
    assert (report["simulation_equal"], report["simulation_steps"]) == (1.0, 0)
    assert 1e-4 < report["max_difference"] < 0.1
    assert float_report["max_difference"] < 1e-5
    assert "simulation_equal" not in float_report


def test_the_report_is_printed(capsys, file, tmp_path):
    code = command.main([f"--weights={file}", "--format=tflite", "--batch=20", f"--out={tmp_path}"])
    out = capsys.readouterr().out
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    assert lines["file"].strip() == str(tmp_path / "digits_tiny.tflite")
    assert lines["same best class"].strip() == "100%"
    assert lines["partitions of the accelerator"].strip() == "1"
    assert lines["operations"].strip() == "2 CONV_2D, 1 FULLY_CONNECTED, 1 MEAN"
    contract = json.loads((tmp_path / "digits_tiny.json").read_text())
    assert contract["input"]["shape"] == [20, 16, 16, 3]


def test_files_are_evaluated_as_their_weights(capsys, exported, file, tmp_path):
    results = []
    files = (file, exported / "digits_tiny.tflite", exported / "onnx" / "digits_tiny.onnx")
    for weights in (*files, exported / "int8" / "digits_tiny_int8.tflite"):
        arguments = [f"--config={CONFIG}", "--mode=eval", f"--weights={weights}", f"--workdir={tmp_path}"]
        assert main_command.main(arguments) == 0
        results.append(json.loads(capsys.readouterr().out))
    ours, tflite, onnx, int8 = results
    for theirs in (tflite, onnx):
        assert theirs["class_accuracy"] == ours["class_accuracy"]
        assert {k: theirs[k] for k in ("top1", "top5", "count")} == {k: ours[k] for k in ("top1", "top5", "count")}
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert int8["count"] == 360
    assert abs(int8["top1"] - ours["top1"]) < 0.05
    assert int8["loss"] != ours["loss"]


def test_another_image_size_than_the_files_is_refused(exported):
    config = load_config(CONFIG, ["--config.data.image_size=20"])
    with pytest.raises(ValueError, match="image_size is 20; the exported file takes images of 16 px alone"):
        evaluate.evaluate_weights(read_exported(exported / "digits_tiny.tflite"), config.data)


def test_a_file_that_normalises_inside_is_given_pixels_whatever_the_config_says(exported):
    from mobilenet_jax.cli.config import load_config

    file = read_exported(exported / "onnx" / "digits_tiny.onnx")
    results = []
    for mean in ((0.0, 0.0, 0.0), (60.0, 50.0, 40.0)):
        config = load_config(CONFIG, ["--config.data.image_size=16", f"--config.data.mean={mean}"])
        results.append(evaluate.evaluate_weights(file, config.data))
    assert results[0] == results[1]


def test_a_file_is_asked_by_predict(capsys, exported, file, tmp_path, write_images):
    images = write_images(tmp_path, 2)
    shown = []
    for weights in (file, exported / "onnx" / "digits_tiny.onnx"):
        assert predict_command.main([f"--weights={weights}", *map(str, images), "--json"]) == 0
        shown.append([[c["class"] for c in entry["classes"]] for entry in json.loads(capsys.readouterr().out)])
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", ["digits_tiny.tflite", "onnx/digits_tiny.onnx"])
def test_predicting_with_a_file_imports_no_jax(exported, tmp_path, write_images, name):
    images = write_images(tmp_path, 1)
    argv = [f"--weights={exported / name}", *map(str, images), "--csv"]
    code = f"import sys; from mobilenet_jax.predict import main; main({argv}); print('jax' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[0] == "path,rank,class,probability,index"
    assert printed.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights=nowhere", "--format=tflite"], "there are no weights nowhere"),
        (["--weights=FILE", "--format=tflite", "--quantize=int8"], "quantize int8 needs calibration"),
        (["--weights=FILE", "--format=tflite", "--calibration=EMPTY"], "EMPTY holds no image"),
        (["--weights=FILE", "--format=web", "--litertjs=EMPTY"], "EMPTY has no @litertjs/core/dist/index.js; valid:"),
        (["--weights=FILE", "--format=tflite", "--litertjs=EMPTY"], "--litertjs is for --format=web"),
        (["--weights=FILE", "--format=onnx", "--quantize=int8", "--float_ends"], "quantize int8 needs calibration"),
    ],
)
def test_a_command_that_cannot_be_obeyed_is_one_sentence(capsys, file, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert command.main([argument.replace("FILE", str(file)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "exports").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [("gone.tflite", "there is no file"), ("text.onnx", "has no contract; valid: a file that python -m mobilenet_jax")],
)
def test_predict_refuses_other_files_in_one_sentence(capsys, tmp_path, name, said):
    (tmp_path / "text.onnx").write_text("no model")
    assert predict_command.main([f"--weights={tmp_path / name}", "a.png"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.usefixtures("optimized")
def test_torchvisions_v2_answers_photographs_in_both_runtimes_as_in_torchvision(reference, tmp_path, monkeypatch):
    skimage = pytest.importorskip("skimage")
    monkeypatch.setattr(report, "_ROUNDS", 1)
    photographs = [Path(skimage.__file__).parent / "data" / name for name in TORCHVISION]
    weights = load_weights(reference / "weights" / "mobilenet_v2-b0353104.pth")
    for kind in ("tflite", "onnx"):
        found = export_weights(weights, format=kind, out=tmp_path)
        assert found["max_difference"] < 1e-5
        assert 13.9e6 < found["bytes"] < 14.1e6
        exported = read_exported(tmp_path / f"torchvision_mobilenet_v2.{kind}")
        for path, answers, error in predict_command.predict(exported, photographs):
            expected = TORCHVISION[path.name]
            assert error is None
            assert [answer.name for answer in answers] == [name for name, _ in expected]
            assert [a.probability for a in answers] == pytest.approx([share for _, share in expected], abs=2e-4)
