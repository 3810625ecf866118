import json

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
            ["--diff", "mobilenet_v2", "mobilenet_v2:torch"],
            "convention is 'torch'; valid: keras, timm, timm_tf, torchvision",
        ),
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


def test_diff_names_what_two_conventions_build_differently(capsys):
    argv = ("--diff", "mobilenet_v2:keras", "mobilenet_v2:torchvision", "--json")
    code, out, _ = _run(capsys, *argv)
    found = {(d["row"], d["field"]): (d["left"], d["right"]) for d in json.loads(out)}
    assert code == 0
    assert found == {
        ("", "padding"): ("same", "symmetric"),
        ("", "bn_epsilon"): (1e-3, 1e-5),
        ("", "bn_decay"): (0.999, 0.9),
    }


def test_trap_02_diff_shows_the_two_width_rules_row_by_row(capsys):
    argv = ("--diff", "mobilenet_v3_large", "mobilenet_v3_large:torchvision", "--width=0.75")
    code, out, _ = _run(capsys, *argv)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["row", "field", "mobilenet_v3_large", "mobilenet_v3_large:torchvision"]
    assert ["network", "params", "3,993,528", "3,377,576"] in lines
    assert ["block_01", "expanded", "64", "48"] in lines
    # What the rows differ by is what the networks differ by.
    rows = [line for line in lines if line[1] == "params" and line[0] != "network"]
    number = lambda text: int(text.replace(",", ""))  # noqa: E731
    assert sum(number(left) - number(right) for _, _, left, right in rows) == 3_993_528 - 3_377_576
    assert "stem" not in {line[0] for line in lines}  # 16 in both, at this width


def test_diff_of_two_models_shows_rows_that_one_lacks(capsys):
    _, out, _ = _run(capsys, "--diff", "mobilenet_v4_conv_small:timm", "mobilenet_v2:timm", "--json")
    found = {(d["row"], d["field"]): (d["left"], d["right"]) for d in json.loads(out)}
    assert found["block_04", "kind"] == ("UniversalInverted", "InvertedResidual")
    assert found["block_04", "start"] == (5, None)
    assert found["block_16", "kind"] == (None, "InvertedResidual")
    assert found["hidden", "params"] == (960 * 1280 + 2 * 1280, None)
    assert ("classifier", "params") not in found  # 1280 x 1000 in both
    assert _run(capsys, "--diff", "mobilenet_v2", "mobilenet_v2:keras") == (0, "no difference\n", "")


def test_no_model_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"which model? valid: {', '.join(MODELS)}")
