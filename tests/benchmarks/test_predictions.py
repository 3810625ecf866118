import csv
import subprocess
import sys

import pytest

from benchmarks.speed.photographs import write_photographs
from benchmarks.speed.predictions import OWN_SIDES, make_commands, measure_predictions, time_command, write_weights
from benchmarks.speed.turns import WorkerError


def print_lines(count: int) -> list[str]:
    return [sys.executable, "-c", f"print('line\\n' * {count}, end='')"]


def test_command_that_answers_for_every_image_is_timed():
    assert 0 < time_command("ours", print_lines(11), 2) < 10


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (print_lines(10), "torch printed 10 lines, where 11 were expected"),
        ([sys.executable, "-c", "raise SystemExit('no such model')"], "torch ended with exit code 1: no such model"),
    ],
)
def test_command_that_does_not_is_one_sentence(command, message):
    with pytest.raises(WorkerError) as error:
        time_command("torch", command, 2)
    assert str(error.value) == message


def test_sides_without_a_file_or_an_interpreter_have_no_command(tmp_path):
    files = {"safetensors": tmp_path / "w.safetensors", "onnx": tmp_path / "w.onnx"}
    commands = make_commands("mobilenet_v2", files, tmp_path, tmp_path, pythons={"onnx": "python"}, threads=2)
    assert list(commands) == ["ours", "ours_onnx", "onnx"]
    assert f"--weights={files['onnx']}" in commands["ours_onnx"]
    assert commands["onnx"][-3:] == [str(files["onnx"]), str(tmp_path), "2"]


@pytest.mark.slow
def test_all_sides_name_the_same_classes(tmp_path):
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("onnxruntime")
    name, images = "mobilenet_v3_small", tmp_path / "images"
    write_photographs(images, 3)
    files = write_weights(name, tmp_path)
    commands = make_commands(name, files, images, tmp_path / "cache", pythons={"onnx": sys.executable}, threads=1)
    assert set(commands) == {*OWN_SIDES, "onnx"}
    found = {}
    for side, command in commands.items():
        rows = csv.DictReader(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
        found[side] = [(row["path"], row["class"]) for row in rows if row["rank"] == "1"]
    assert len(found["ours"]) == 3
    assert all(rows == found["ours"] for rows in found.values())


@pytest.mark.slow
def test_ratios_are_of_whole_commands(tmp_path):
    pytest.importorskip("onnxruntime")
    write_photographs(tmp_path, 2)
    result = measure_predictions(
        "mobilenet_v3_small", tmp_path, against=["onnx", "torch"], pythons={}, rounds=1, threads=1
    )
    sides = result["sides"]
    assert result["count"] == 2
    assert result["ratios"]["onnx"]["median"] == sides["onnx"]["seconds"][0] / sides["ours"]["seconds"][0]
    assert all(values["images_per_second"] == 2 / values["seconds"][0] for values in sides.values())
    assert ("torch" in sides) != ("torch" in result["absent"])
