"""The command: options, output formats, and mistakes."""

import json

import pytest

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.summary import diff_specs, format_diff, format_table, format_totals, make_summary
from mobilenet_jax.models.zoo import MODELS, make_spec
from mobilenet_jax.summary import main


def _run(capsys, *argv):
    """Return (exit code, standard output, standard error)."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_options_reach_the_network(capsys):
    argv = ("--width=0.5", "--resolution=96", "--num_classes=10", "--convention=torchvision", "--json")
    code, out, _ = _run(capsys, "mobilenet_v2", *argv)
    spec = make_spec("mobilenet_v2", width=0.5, num_classes=10, convention="torchvision")
    assert code == 0
    assert json.loads(out) == {**make_summary(spec, 96), "width": 0.5, "convention": "torchvision"}
    assert json.loads(out)["resolution"] == 96


def test_the_table_stands_above_the_totals(capsys):
    code, out, _ = _run(capsys, "mobilenet_v2")
    spec = make_spec("mobilenet_v2")
    assert code == 0
    assert out.rstrip("\n").split("\n\n") == [
        "mobilenet_v2, width 1, 224 px, keras convention",
        format_table(compute_cost(spec, 224)),
        format_totals(make_summary(spec, 224)),
    ]


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
        (["mobilenet_v2", "--width=-1"], "width is -1.0; valid: a number, finite and above 0"),
        (["mobilenet_v2", "--num_classes=-1"], "num_classes is -1; valid: 0 (no classifier) or more"),
        (
            ["mobilenet_v1", "--resolution=16"],
            "a map of 1x1 is too small for a 3x3 convolution of stride 2: use a larger image_size",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, message):
    assert _run(capsys, *argv) == (2, "", message + "\n")


def test_diff_is_text_or_json(capsys):
    names = ("mobilenet_v3_large", "mobilenet_v3_large:torchvision")
    left, right = (make_spec("mobilenet_v3_large", width=0.75, convention=c) for c in ("keras", "torchvision"))
    differences = diff_specs(left, right, 224)
    assert differences
    text = format_diff(differences, names)
    assert _run(capsys, "--diff", *names, "--width=0.75") == (0, text + "\n", "")
    code, out, _ = _run(capsys, "--diff", *names, "--width=0.75", "--json")
    assert (code, json.loads(out)) == (0, differences)
    assert _run(capsys, "--diff", "mobilenet_v2", "mobilenet_v2:keras") == (0, "no difference\n", "")
    assert _run(capsys, "--diff", "mobilenet_v2", "mobilenet_v2:keras", "--json") == (0, "[]\n", "")


def test_no_model_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"a model is missing; valid: {', '.join(MODELS)}")
