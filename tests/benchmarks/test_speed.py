"""The command as a whole; its parts have tests of their own in this folder."""

import importlib.metadata
import json
import sys
import venv
from types import SimpleNamespace

import pytest

from benchmarks.speed import run as speed
from benchmarks.speed.__main__ import main, parse
from benchmarks.speed.cases import AUGMENTATIONS, SCALING, Case, make_cases
from benchmarks.speed.run import format_result, run_case
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.zoo import make_spec

TINY = ["--models=mobilenet_v1", "--width=0.1", "--resolution=32", "--batch_size=2", "--threads=1"]
TINY += ["--rounds=1", "--seconds=0.01"]


def run(capsys, *argv) -> SimpleNamespace:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def test_training_beside_a_peer_that_is_not_installed(capsys, tmp_path):
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    file = tmp_path / "numbers.json"
    done = run(capsys, *TINY, "--what=train", "--against=torch", f"--python_torch={python}", f"--json={file}")
    report = json.loads(file.read_text())
    assert done.code == 0
    assert f"  absent: torch: No module named 'torch' in {python}" in done.out.splitlines()
    assert (report["flags"]["rounds"], report["load_average"] >= 0) == (1, True)
    assert report["environment"]["devices"] == ["cpu: 1 cores for each side"]
    (result,) = report["results"]
    spec = make_spec("mobilenet_v1", width=0.1)
    assert result["madds"] == compute_cost(spec, 32).madds
    assert result["activation_bytes"] == 4 * compute_cost(spec, 32).training_elements
    ours = result["sides"]["ours"]
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"][0])
    assert ours["about"]["compile_seconds"] > 0
    # A step cannot need less than half of the activations that its backward pass reads.
    assert ours["about"]["temporary_bytes_per_image"] > result["activation_bytes"] / 2
    assert (result["ratios"], result["failed"]) == ({}, {})


def test_inference_beside_flax(capsys, tmp_path):
    file = tmp_path / "numbers.json"
    done = run(capsys, *TINY, "--what=infer", "--against=flax", f"--json={file}")
    (result,) = json.loads(file.read_text())["results"]
    assert (done.code, list(result["sides"])) == (0, ["ours", "flax"])
    seconds = {side: values["seconds"][0] for side, values in result["sides"].items()}
    ratio = seconds["flax"] / seconds["ours"]
    assert result["ratios"] == {"flax": {"median": ratio, "min": ratio, "max": ratio}}
    assert f"ours is {ratio:.2f} times as fast ({ratio:.2f}-{ratio:.2f})" in done.out


def test_inference_beside_the_runtimes_of_exported_files(capsys, tmp_path):
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "numbers.json"
    done = run(capsys, *TINY, "--what=infer", "--against=litert,onnx", f"--json={file}")
    (result,) = json.loads(file.read_text())["results"]
    assert (done.code, result["failed"], result["absent"]) == (0, {}, {})
    versions = {side: values["about"]["versions"] for side, values in result["sides"].items()}
    installed = {name: importlib.metadata.version(name) for name in ("jax", "ai_edge_litert", "onnxruntime")}
    assert versions == dict(zip(("ours", "litert", "onnx"), ({k: v} for k, v in installed.items()), strict=True))
    assert set(result["ratios"]) == {"litert", "onnx"}


def test_input_is_the_loader_and_every_augmentation(capsys, tmp_path):
    file = tmp_path / "numbers.json"
    argv = [*TINY, "--what=input", "--photographs=8", "--photograph_size=600x450", f"--json={file}"]
    argv += ["--against=ours_fast,ours_resized"]
    done = run(capsys, *argv)
    report = json.loads(file.read_text())
    assert done.code == 0
    assert [r["name"] for r in report["results"]] == ["Inception crop and flip", *AUGMENTATIONS]
    assert report["photographs"]["count"] == 8
    assert all(r["sides"]["ours"]["images_per_second"] > 0 for r in report["results"])
    first, *others = report["results"]
    assert report["flags"]["photograph_size"] == [600, 450]
    assert all(values["images_per_second"] > 0 for values in first["sides"].values())
    assert set(first["ratios"]) == {"ours_fast", "ours_resized"}
    assert all(set(result["sides"]) == {"ours"} for result in others)


@pytest.mark.parametrize("size", ["4000", "0x3", "axb", "-1x5", "100000x1"])
def test_sizes_that_are_none_are_refused(capsys, size):
    with pytest.raises(SystemExit):
        parse([f"--photograph_size={size}"])
    assert "valid: WIDTHxHEIGHT in pixels" in capsys.readouterr().err


def test_what_workers_keep_is_not_measured(capsys):
    done = run(capsys, *TINY, "--what=input", "--photographs=4", "--against=ours_resized", "--workers=1")
    assert "  absent: ours_resized: what workers keep in memory would be lost after each turn" in done.out


def test_side_that_failed_is_named_and_the_exit_code_is_1(capsys):
    # Only our layers check the dtype, so the worker refuses the network.
    done = run(capsys, *TINY, "--what=memory", "--against=", '--options={"dtype": "float8"}')
    assert done.code == 1
    last = done.out.splitlines()[-1]
    assert last.startswith("  failed: ours ended with exit code 1: ValueError: dtype is 'float8'; valid: float32,")


def cases(*argv) -> list[Case]:
    return list(make_cases(parse(list(argv))))


def test_train_infer_and_memory_are_products_of_the_flags():
    found = cases("--what=train,infer,memory", "--models=mobilenet_v1,mobilenet_v2", "--batch_size=1,8", "--width=1,.5")
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2
    assert {(c.what, c.resolution, c.devices) for c in found} == {(w, 224, 1) for w in ("train", "infer", "memory")}


def test_scaling_moves_one_thing_at_a_time_from_its_base():
    base, *others = cases("--what=scaling", "--models=mobilenet_v2", "--resolution=96")
    assert (base.width, base.resolution, base.batch_size, base.devices) == (1.0, 96, 16, 1)
    # The base is among the values of each.
    assert len(others) == sum(len(values) - 1 for values in SCALING.values())
    for case in others:
        assert sum(vars(case)[key] != vars(base)[key] for key in SCALING) == 1
        assert case.batch_size % case.devices == 0


@pytest.mark.parametrize(
    ("devices", "what", "expected"),
    [
        (1, "train", ["ours", "flax", "keras", "torch", "torch_compile"]),
        (2, "train", ["ours", "flax"]),
        (1, "memory", ["ours", "flax", "torch"]),
        (1, "input", ["ours", "tfdata", "ours_fast", "ours_resized"]),
        (1, "augment", ["ours"]),
    ],
)
def test_each_case_goes_to_the_sides_that_have_it(monkeypatch, devices, what, expected):
    asked = {}

    def measure(case, sides, **options):
        asked.update(options, sides=sides, case=case)
        return {"sides": {}, "ratios": {}, "absent": {}, "failed": {}}

    monkeypatch.setattr(speed, "measure", measure)
    case = Case(group=what, what=what, name="mobilenet_v2", resolution=64, batch_size=4, devices=devices)
    args = parse(["--rounds=3", f"--python_keras={sys.executable}"])
    result = run_case(case, args, "/images")
    assert asked["sides"] == expected
    assert asked["pythons"] == {"keras": sys.executable}
    assert asked["rounds"] == (0 if what == "memory" else 3)
    assert asked["case"]["threads"] == 2
    assert result["madds"] == compute_cost(make_spec("mobilenet_v2"), 64).madds


def test_startup_line_has_medians_and_the_range():
    split = [{"import": 2.0, "compile": c} for c in (5.0, 9.0, 6.0)]
    sides = {"cold": {"seconds": [8.0, 12.0, 9.0], "split": split}}
    result = {"what": "startup", "sides": sides, "absent": {}, "failed": {}}
    assert format_result("startup mobilenet_v2", result).splitlines() == [
        "startup mobilenet_v2",
        "  cold                 9.0 s (8.0-12.0): import 2.0, compile 6.0",
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--what=trian", "'trian'; valid: train, infer, memory, scaling, input, predict, startup"),
        ("--models=mobilenet_v5", "'mobilenet_v5'; valid: mobilenet_v1, "),
        ("--against=jax", "'jax'; valid: flax, keras, torch, torch_compile, litert, onnx, tfdata"),
        ("--resolution=big", "invalid comma-separated int value: 'big'"),
        ("--rounds=0", "rounds, threads, photographs, widths, resolutions and batch sizes must be above 0"),
        ("--python_torch=/no/such/python", "/no/such/python is not a file"),
        ('--options={"lowering": "plain"}', "valid: a JSON object of create_model's options except lowering"),
        ("--options=[1]", "'[1]'; valid: a JSON object of create_model's options"),
        ("--options=bfloat16", "'bfloat16' is not JSON; valid: "),
        ("--json=no/such/folder/numbers.json", "--json: no/such/folder is not a folder"),
        ("--python_flax=python", "unrecognized arguments"),
    ],
)
def test_bad_flags_are_usage_errors(capsys, flag, message):
    with pytest.raises(SystemExit) as error:
        main([flag])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models=mobilenet_v3_small", '--options={"se_gate": "x"}'], "se_gate is 'x'; valid: "),
        (["--models=mobilenet_v1", "--resolution=16"], "a map of 1x1 is too small"),
        (['--options={"no_option": 1}'], "no_option"),
        (["--threads=4096"], "--threads is 4096; this process may use "),
        (["--draw=no.json"], "No such file or directory: 'no.json'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_before_anything_is(capsys, argv, message):
    done = run(capsys, *argv)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_draw_reads_what_json_wrote(capsys, tmp_path):
    ratio = {"median": 2.0, "min": 1.5, "max": 2.5}
    result = {"group": "train", "what": "train", "name": "mobilenet_v2", "resolution": 32, "batch_size": 2}
    result |= {"sides": {}, "ratios": {"flax": ratio}}
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps({"results": [result]}))
    done = run(capsys, f"--draw={file}", f"--out={tmp_path / 'docs'}")
    assert (done.code, done.out.splitlines()[-1]) == (0, str(tmp_path / "docs" / "ratios.png"))
    assert (tmp_path / "docs" / "ratios.png").read_bytes().startswith(b"\x89PNG")
