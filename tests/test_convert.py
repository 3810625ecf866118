from mobilenet_jax import load_weights
from mobilenet_jax.convert import main


def test_files_are_converted_and_back(reference, tmp_path, capsys):
    source = reference / "fixtures" / "torchvision_v2_035" / "weights_legacy.pth"
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    assert main([str(source), str(ours)]) == 0
    assert capsys.readouterr().out == f"{ours}: torchvision/mobilenet_v2, 10 classes, as safetensors\n"
    assert main([str(ours), str(theirs), "--format=torchvision"]) == 0
    first, second, third = (load_weights(path)[2] for path in (source, ours, theirs))
    assert first == second
    assert {**third, "source": None} == {**first, "source": None}


def test_refusals_are_one_sentence(reference, tmp_path, capsys):
    source = reference / "fixtures" / "timm_v3_small_050" / "weights.safetensors"
    target = tmp_path / "w.safetensors"
    for argv, message in (
        ([source, target], "timm/mobilenetv3_small_050 or timm/tf_mobilenetv3_small_050"),
        (
            [source, target, "--name=timm/mobilenetv3_small_050", "--format=torchvision"],
            "torchvision has no mobilenet_v3",
        ),
        (["nowhere", target], "there are no weights nowhere"),
        (["torchvision/resnet50", target], "no published weights 'torchvision/resnet50'"),
    ):
        assert main(list(map(str, argv))) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not target.exists()
