"""The commands for accelerators, on a CPU."""

import importlib.util
import json

import pytest

from benchmarks import accelerator, tpu_compile


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_small_measurement_has_every_number(tmp_path, capsys):
    file = tmp_path / "small.json"
    assert accelerator.main(["--small", f"--json={file}"]) == 0
    results = json.loads(file.read_text())["results"]
    assert [(r["what"], r.get("form")) for r in results] == [
        ("difference from CPU", None),
        *((what, form) for what in ("train", "infer") for form in ("auto", "plain", "shifted_sum")),
        ("run on JPEGs", None),
    ]
    assert results[0]["highest"] == results[0]["default"] == 0  # the device is the CPU
    for result in results[1:]:
        assert result["images_per_second"] > 0
    assert 0 <= results[-1]["data_wait"] <= 1
    assert capsys.readouterr().out.count("images_per_second") == 7


def test_bad_flags_are_one_sentence(capsys, tmp_path):
    for command, flags, message in (
        (accelerator, ["--batch_sizes", "0"], "resolution, seconds and batch sizes must be above 0"),
        (accelerator, [f"--json={tmp_path / 'no' / 'file'}"], "is not a folder"),
        (tpu_compile, ["--topologies=v9"], "valid: v5e-1, v5e-4, v5e-8, v4-32"),
        (tpu_compile, ["--images_per_device=0"], "--images_per_device is 0; valid: 1 or more"),
    ):
        with pytest.raises(SystemExit) as end:
            command.parse(flags)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tpu_compile.main([]) == 2
    assert capsys.readouterr().err == (
        'libtpu, the compiler for TPUs, is not installed; run pip install -e ".[tpu]" -c constraints.txt\n'
    )


def test_evaluation_is_compiled_once_for_both_values_of_remat():
    cases = list(tpu_compile.list_cases(tpu_compile.parse(["--recipes", "v1:imagenet", "--remat=off,on"])))
    assert [(step, options["remat"]) for _, _, step, options in cases] == [
        ("train", False),
        ("train", True),
        ("eval", False),
    ]


def test_instructions_of_a_program_are_counted_by_name():
    text = """
ENTRY %main {
  %p = f32[2,3]{1,0:T(2,128)} parameter(0)
  %copy.1 = f32[2,3]{0,1:T(2,128)} copy(%p)
  %pair = (f32[2,3]{1,0:T(2,128)}, f32[]) fusion(%copy.1), kind=kLoop, calls=%copy_fusion
  ROOT %transpose.2 = f32[3,2]{1,0:T(2,128)} transpose(%copy.1), dimensions={1,0}
}
"""
    assert tpu_compile.find_instructions(text) == ["parameter", "copy", "fusion", "transpose"]


def test_the_step_of_a_recipe_is_lowered_for_the_devices_that_are_given(one_device):
    import jax

    overrides = {"data.batch_size": 4, "data.image_size": 32, "model.width": 0.25, "model.shallow": True}
    config = tpu_compile.load_recipe("v1:imagenet", overrides)
    for what, argument in (("train", "4x32x32x3xui8"), ("eval", "4x32x32x3xui8")):
        assert argument in tpu_compile.lower_step(config, jax.devices(), what).as_text()
