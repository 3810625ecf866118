import json
import subprocess
import sys
import time

import pytest

from mobilenet_jax.models.zoo import MODELS, make_spec
from mobilenet_jax.summary import main, make_summary


def _run(capsys, *argv):
    """(exit code, standard output, standard error)."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_trap_09_json_states_the_trainable_count(capsys):
    code, out, _ = _run(capsys, "mobilenet_v3_large", "--width=0.75", "--json")
    found = json.loads(out)
    channels = [
        16,
        16,
        16,
        64,
        64,
        24,
        72,
        72,
        24,
        72,
        72,
        24,
        72,
        32,
        96,
        96,
        24,
        96,
        32,
        96,
        96,
        24,
        96,
        32,
    ]
    channels += [192, 192, 64, 160, 160, 64, 144, 144, 64, 144, 144, 64, 384, 384, 96, 384, 88]
    channels += [528, 528, 136, 528, 88, 528, 528, 136, 528, 120] + 2 * [720, 720, 184, 720, 120]
    assert code == 0
    assert found == {
        "model": "mobilenet_v3_large",
        "width": 0.75,
        "convention": "keras",
        "resolution": 224,
        "num_classes": 1000,
        "params": 3_993_528,
        "batch_stats": 19_088,
        "madds": 154_560_624,
        "attention_madds": 0,
        "channels": [*channels, 720, 1280, 1000],
        # 64 channels behind the first expansion and 16 of its input, at 112 px, in float32
        "activation_bytes_inference": 4 * 112 * 112 * (64 + 16),
        "activation_bytes_training": 34_520_928,
        "standard_params": 10_783_000,
        "standard_madds": 872_918_656,
    }


def test_options_reach_the_spec(capsys):
    argv = (
        "mobilenet_v2",
        "--width=0.5",
        "--resolution=96",
        "--num_classes=10",
        "--convention=torchvision",
        "--json",
    )
    _, out, _ = _run(capsys, *argv)
    spec = make_spec("mobilenet_v2", width=0.5, num_classes=10, convention="torchvision")
    assert json.loads(out) == {**make_summary(spec, 96), "width": 0.5, "convention": "torchvision"}
    assert json.loads(out)["resolution"] == 96


def test_trap_10_table_adds_up_to_the_grouped_count(capsys):
    code, out, _ = _run(capsys, "mobilenet_v2")
    table, totals = out.split("\n\n")[1:]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert code == 0
    assert [row[0] for row in rows] == ["stem", *(f"block_{i:02d}" for i in range(17)), "head", "classifier"]
    assert [rows[i][1] for i in (0, 1, 17, 18, 19)] == [
        "112x112x32",
        "112x112x16",
        "7x7x320",
        "7x7x1280",
        "1x1x1000",
    ]
    numbers = [[int(field.replace(",", "")) for field in row[2:4]] for row in rows]
    assert [sum(column) for column in zip(*numbers, strict=True)] == [3_504_872, 300_774_272]
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    for text in (
        "trainable parameters        3,504,872",
        "statistics       34,112",
        "multiply-adds               300,774,272",
    ):
        assert text in totals


def test_standard_convolutions_stand_beside(capsys):
    # 1704.04861, Table 4
    _, out, _ = _run(capsys, "mobilenet_v1")
    assert "29,294,088 parameters, 4,867,293,184 multiply-adds: 8.56 times as many" in out


def test_list(capsys):
    code, out, _ = _run(capsys, "--list")
    assert code == 0
    assert out.split() == list(MODELS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mobilenet_v5"], f"model name is 'mobilenet_v5'; valid: {', '.join(MODELS)}"),
        (
            ["mobilenet_v2", "--convention=torch"],
            "convention is 'torch'; valid: keras, timm, timm_tf, torchvision",
        ),
        (["mobilenet_v2", "--width=-1"], "width is -1.0; valid: finite, above 0"),
        (["mobilenet_v2", "--num_classes=-1"], "num_classes is -1; valid: 0 (no classifier) or more"),
        (
            ["mobilenet_v1", "--resolution=16"],
            "a map of 1x1 is too small for a 3x3 convolution of stride 2: use a larger image_size",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, message):
    assert _run(capsys, *argv) == (2, "", message + "\n")


def test_no_model_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"which model? valid: {', '.join(MODELS)}")


def test_starts_fast_without_jax():
    # -X importtime names every module that is imported.
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mobilenet_jax.summary", "mobilenet_v2", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "mobilenet_jax.models.zoo" in imported
    assert not imported & {"jax", "jaxlib", "flax", "numpy", "tensorflow"}
    assert json.loads(run.stdout)["madds"] == 300_774_272
    assert seconds < 1
