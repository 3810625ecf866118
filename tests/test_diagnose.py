"""The command, from files to files."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from mobilenet_jax.diagnose import main
from mobilenet_jax.diagnosis.images import open_evaluation_set
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training.run import train_and_evaluate
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir.metrics import read_metrics
from tests.cards import make_test_card


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of random weights with three filters of the first depthwise layer zeroed."""
    whole = create_model("mobilenet_v1", width=0.25, num_classes=10, stride_one=(0,), lowering="plain")
    model = whole.clone(spec=dataclasses.replace(whole.spec, blocks=whole.spec.blocks[:4]))  # less to compile
    variables = init_variables(model, seed=0)
    variables["params"]["block_00"]["depthwise"]["conv"]["kernel"][..., [1, 4, 6]] = 0
    card = make_test_card(model.spec, name="planted", width=0.25, source={"file": "planted.safetensors", "sha256": ""})
    card["preprocessing"] |= {"image_size": 16, "crop_share": 1.0}
    path = tmp_path_factory.mktemp("weights") / "planted.safetensors"
    save_weights(path, model, variables, card)
    return str(path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(["--compilation_cache=off", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_planted_dead_filters_arrive_in_all_files(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "inner").mkdir(parents=True)
    for i, folder in enumerate(("images", "images", "images/inner")):
        noise = rng.integers(256, size=(20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / folder / f"{i}.png")
    out = tmp_path / "out"
    code, text, err = run(
        capsys, f"--weights={weights}", f"--data={tmp_path / 'images'}", "--batch_size=2", f"--out={out}"
    )
    assert code == 0
    assert "3 images of" in text.splitlines()[0]
    assert "3 of 88 depthwise filters are dead" in text
    assert "block_00/depthwise 3 of 8" in text
    report = json.loads((out / "diagnosis.json").read_text())
    assert report["images"]["count"] == 3
    assert [f["channel"] for f in report["layers"][1]["dead_filters"]] == [1, 4, 6]
    assert report["quantisation"]["per_channel"]["kl"] >= 0
    with Image.open(out / "diagnosis.png") as image:
        assert image.size[0] > 1000
    assert "diagnosis.json" in err


def test_a_run_logs_dead_filters_and_is_diagnosed_with_its_gradient_norms(tmp_path, capsys, one_device):
    config = base.get_config()
    settings = {
        "model.name": "mobilenet_v1",
        "model.width": 0.1,
        "model.stride_one": (0,),
        "model.lowering": "plain",  # compiles fastest
        "data.image_size": 16,
        "data.batch_size": 32,
        "train.steps": 4,
        "train.log_every_steps": 1,
        "train.diagnose_every_steps": 2,
    }
    config.update_from_flattened_dict(settings)
    train_and_evaluate(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    keys = {"train/dead_filters", "train/filters_below_1e-1", "train/variances_below_epsilon"}
    assert [bool(keys & line.keys()) for line in lines] == [False, True, False, True]
    assert keys <= lines[1].keys()
    code, text, _ = run(capsys, f"--weights={tmp_path / 'run'}", "--json")
    report = json.loads(text)
    assert code == 0
    assert report["images"] is None
    assert report["grad_norm"]["norms"] == [line["train/grad_norm"] for line in lines]
    dead = sum(len(layer["dead_filters"]) for layer in report["layers"] if layer["kind"] == "depthwise")
    assert dead == lines[3]["train/dead_filters"]


def test_a_configs_evaluation_set_is_prepared_as_the_card_says_but_for_overrides(weights):
    card = load_weights(weights)[2]
    images = open_evaluation_set("configs/v1.py", ["--config.data.mean=(1.0,2.0,3.0)"], card, batch_size=100)
    batches = list(images.batches)
    assert images.count == sum(batch["mask"].sum() for batch in batches) == 360
    assert {batch["images"].shape for batch in batches} == {(100, 16, 16, 3)}  # 32 in the config, 16 on the card
    assert (images.size, images.mean, images.std) == (16, (1.0, 2.0, 3.0), (127.5, 127.5, 127.5))
    assert images.source == "the evaluation set of configs/v1.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights=nothing.pth"], "there are no weights nothing.pth"),
        (["--weights={weights}", "--data={empty}"], "{empty} holds no image"),
        (["--weights={weights}", "--config=configs/v9.py"], "configs/v9.py is not a file"),
        (["--weights={weights}", "--config=configs/v1.py", "--config.data.sorce=x"], "did you mean source?"),
        (["--weights={weights}", "--data={weights}"], "cannot be decoded"),
    ],
)
def test_bad_input_is_one_sentence(weights, tmp_path, capsys, argv, message):
    names = {"weights": weights, "empty": str(tmp_path)}
    code, out, err = run(capsys, *(argument.format(**names) for argument in argv))
    assert code == (1 if "decoded" in message else 2)
    assert out == ""
    assert message.format(**names) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.data.path=x"], "--config.data.path=x overrides a key of --config, which is not given"),
        (["--batch_size=0"], "batch_size is 0; valid: 1 or more"),
    ],
)
def test_flags_that_cannot_be_are_a_usage_error(weights, capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        run(capsys, f"--weights={weights}", *argv)
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
