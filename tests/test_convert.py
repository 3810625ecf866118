from mobilenet_jax import create_model, init_variables, load_weights, save_weights
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


def test_what_a_foreign_file_cannot_hold_is_said_and_lies_beside_it(tiny_weights, tmp_path, capsys):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    model = create_model("mobilenet_v2", width=0.1, num_classes=3, convention="torchvision")
    card = {**tiny_weights[2], "model": "mobilenet_v2", "convention": "torchvision"}
    save_weights(ours, model, init_variables(model, seed=0), card)
    assert main([str(ours), str(theirs), "--format=torchvision"]) == 0
    said = capsys.readouterr().out
    assert f"{theirs}.card.json: class names, preprocessing and metrics, which a torchvision file cannot hold" in said
    found = load_weights(theirs)[2]
    assert (found["class_names"], found["preprocessing"]) == (
        card["class_names"],
        load_weights(ours)[2]["preprocessing"],
    )
    assert main([str(theirs), str(ours), "--classifier=drop", "--in_channels=1"]) == 0
    spec = load_weights(ours)[0].spec
    assert (spec.num_classes, spec.in_channels) == (0, 1)
    assert "left out: the classifier" in capsys.readouterr().out
