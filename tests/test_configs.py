"""The recipes are complete, locked and runnable, and have the values of the published rows that they cite."""

import dataclasses
import importlib
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base, distill, fashion_mnist, transfer
from configs.datasets import DATASETS
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.data.sources import DataInfo, open_source
from mobilenet_jax.models import zoo
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training import build
from mobilenet_jax.training.build import build_model
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.plan import make_plan
from mobilenet_jax.training.result import count_trained
from mobilenet_jax.training.run import train_and_evaluate
from mobilenet_jax.training.validate import check_config
from mobilenet_jax.weights.card import IMAGENET
from mobilenet_jax.weights.save import save_weights
from tests.cards import make_test_card

ROOT = Path(__file__).resolve().parents[1]
SPLIT_SIZES = (("holdout", 630), ("train", 1470))  # of UC Merced
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("v*.py"))


def get_config(recipe: str, dataset: str) -> Any:
    return importlib.import_module(f"configs.{recipe}").get_config(dataset)


def test_the_recipes_are_those_of_four_papers():
    assert RECIPES == ["v1", "v2", "v3_large", "v3_small", "v4"]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_exactly_the_documented_keys(recipe, dataset):
    config = get_config(recipe, dataset)
    assert config.is_locked
    keys = flatten_config(base.get_config()).keys()
    assert flatten_config(config).keys() == keys
    assert config.name == f"{config.model.name}_{dataset}"
    # V3-Small uses `train_on_imagenet` of v3_large.py.
    text = "".join((ROOT / "configs" / f"{name}.py").read_text() for name in (recipe, "v3_large"))
    assert all(f"optim.{key} =" in text for key in ("name", "lr_per_256", "epsilon", "l2"))


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match=r"no variant 'foo'; valid: digits, fashion_mnist, .*imagenet"):
        get_config("v2", "foo")
    with pytest.raises(ValueError, match=r"no size 'huge'; valid: conv_small, conv_medium, .*hybrid_large"):
        get_config("v4", "huge,digits")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bare_path_is_digits(recipe):
    assert importlib.import_module(f"configs.{recipe}").get_config().data.source == "digits"


@pytest.mark.parametrize("devices", [1, 8, 32, 256])
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_on_every_number_of_devices_that_share_its_training_batch(recipe, dataset, devices):
    config = get_config(recipe, dataset)
    if config.data.batch_size % devices:
        assert dataset != "imagenet"
        with pytest.raises(ValueError, match=rf"^data\.batch_size .* with {devices} devices"):
            check_config(config, device_count=devices, process_count=1)
    else:
        check_config(config, device_count=devices, process_count=max(1, devices // 8))


@pytest.mark.parametrize("phases", transfer.PHASES)
@pytest.mark.parametrize("dataset", transfer.DATASETS)
def test_transfer_has_the_documented_keys_and_leaves_the_network_to_the_weights(dataset, phases):
    config = transfer.get_config(f"{dataset},{phases}")
    assert config.is_locked
    assert flatten_config(config).keys() == flatten_config(base.get_config()).keys()
    assert config.name == f"transfer_{dataset}_{phases}"
    assert (config.model.name, config.model.width, config.model.convention, config.data.mean) == (None,) * 4
    assert config.train.freeze_stats == (phases != "finetune")
    assert config.train.cache_features == (phases == "probe")
    assert (config.optim.freeze_epochs is not None) == (phases == "finetune")


def test_transfer_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="no variant 'imagenet'; valid: folder, uc_merced, digits"):
        transfer.get_config("imagenet")
    with pytest.raises(ValueError, match="no way to train 'half'; valid: probe, frozen, finetune"):
        transfer.get_config("folder,half")


@pytest.mark.parametrize("dataset", distill.DATASETS)
def test_distill_has_the_documented_keys_and_a_narrow_student(dataset):
    config = distill.get_config(dataset)
    assert config.is_locked
    assert flatten_config(config).keys() == flatten_config(base.get_config()).keys()
    assert (config.name, config.model.name) == (f"distill_{dataset}", "mobilenet_v3_small")
    assert config.model.width <= 0.35
    assert (config.train.distill.weight, config.data.mixup) == (1.0, 1.0)
    check_config(config, device_count=1, process_count=1)


def test_distill_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="no variant 'imagenet'; valid: digits, folder"):
        distill.get_config("imagenet")


def test_transfer_keys_that_are_none_take_overrides():
    overrides = ["--config.init=w.pth", "--config.data.mean=(1.0, 2.0, 3.0)", "--config.data.image_size=96"]
    config = load_config(f"{ROOT / 'configs' / 'transfer.py'}:folder,frozen", [*overrides, "--config.model.width=0.5"])
    assert (config.data.mean, config.data.image_size, config.model.width) == ((1.0, 2.0, 3.0), 96, 0.5)


def write_uc_merced(root: Path) -> None:
    """Write as many photographs in as many classes as UC Merced has; each has 2x2 pixels."""
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "png")
    for label in range(21):
        folder = root / "train" / f"class_{label:02}"
        folder.mkdir(parents=True)
        for i in range(100):
            (folder / f"{i:02}.png").write_bytes(image.getvalue())


@pytest.mark.usefixtures("one_device")
def test_uc_merced_trains_26901_parameters_on_70_percent(tmp_path):
    """The published protocol; only the photographs and the weights are made up."""
    write_uc_merced(tmp_path / "photographs")
    model = create_model("mobilenet_v2", convention="torchvision")
    card = make_test_card(model.spec, name="torchvision/mobilenet_v2", convention="torchvision", preprocessing=IMAGENET)
    shapes = jax.eval_shape(lambda: init_variables(model, seed=0))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    save_weights(tmp_path / "w.safetensors", model, variables, card)
    config = transfer.get_config("uc_merced")
    assert config.data.source == "tfds:uc_merced"
    config.data.update({"source": "folder", "path": str(tmp_path / "photographs")})
    config.init = str(tmp_path / "w.safetensors")
    setup = build.build(config, tmp_path / "run")
    assert (setup.info.num_classes, setup.info.train_count, setup.info.eval_count) == (21, 1470, 630)
    assert count_trained(setup, build.list_param_shapes(setup.model.spec)) == 26_901 == 1280 * 21 + 21
    assert (setup.model.spec.name, setup.model.freeze_stats) == ("mobilenet_v2", True)
    assert setup.config.data.image_size == 224
    assert tuple(setup.config.data.mean) == IMAGENET.mean
    assert setup.plan.total_steps == math.ceil(20 * 1470 / 32)
    sources = [(open_source(config.data, split), count) for split, count in SPLIT_SIZES]
    names = {source[i].name for source, count in sources for i in range(count)}
    assert len(names) == 2100  # no photograph is in both


def test_recipes_load_without_jax_and_without_a_device():
    code = (
        "import sys\n"
        "from configs import v1, v2, v3_large, v3_small, v4, transfer, fashion_mnist, distill\n"
        "for file in (v1, v2, v3_large, v3_small, v4): file.get_config('imagenet')\n"
        "transfer.get_config(), fashion_mnist.get_config(), distill.get_config()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    slow = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow", "PIL", "matplotlib", "mobilenet_jax"}
    assert not slow & {*run.stdout.split()}
    assert "ml_collections" in run.stdout.split()


def test_every_key_has_a_comment():
    lines = (ROOT / "configs" / "base.py").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"    [\w.]+\.\w+ = (?!.*ConfigDict\(\))", line)]
    keys = [re.sub(r"^config\.", "", lines[i].split(" = ")[0].strip()) for i in settings]
    assert set(keys) == flatten_config(base.get_config()).keys()
    # The comment stands at the end of the line or above it.
    bare = [lines[i] for i in settings if "  # " not in lines[i] and not lines[i - 1].strip().startswith("#")]
    assert bare == []


def test_uc_merced_has_21_classes_and_holds_out_its_test_images():
    config = get_config("v2", "uc_merced")
    assert config.data.source == "tfds:uc_merced"
    assert config.data.holdout == 0.3  # 2,100 images without a test split


def test_fashion_mnist_has_fewer_parameters_than_densenet_and_sees_the_test_images_once():
    config = fashion_mnist.get_config()
    assert config.is_locked
    assert flatten_config(config).keys() == flatten_config(base.get_config()).keys()
    names = tuple(map(str, range(10)))
    model = build_model(config, DataInfo(10, names, train_count=60_000, eval_count=10_000))
    cost = compute_cost(model.spec, config.data.image_size)
    assert (cost.params, cost.madds) == (595_562, 16_992_976)
    assert cost.params < 768_000
    assert config.data.holdout == 0.0  # training sees all of the training images
    plan = make_plan(config, 60_000)
    assert plan.eval_every == plan.total_steps  # no choice is made on the test images


def test_a_data_set_that_is_not_prepared_is_refused_with_the_command_to_prepare_it(tmp_path):
    config = get_config("v2", "uc_merced")
    config.data.data_dir = str(tmp_path)
    with pytest.raises(ValueError, match="tfds build uc_merced --file_format=array_record") as error:
        train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["v3_large", "v3_small"])
def test_trap_14_v3_decays_by_a_hundredth_and_drops_a_fifth(recipe):
    config = get_config(recipe, "imagenet")
    assert config.optim.schedule == "staircase"
    assert (config.optim.decay_factor, config.optim.decay_epochs) == (0.99, 3.0)
    assert config.model.dropout == 0.2


# The rows that a recipe cites: (row, column, pattern in that cell, (key, value)).
CITED = {
    "v1": [
        ("V1 paper", "optimizer", "RMSprop", ("optim.name", "rmsprop")),
        ("V1 paper", "augment, smoothing", "no label smoothing", ("train.label_smoothing", 0.0)),
        ("V1 slim script", "WD", "4e-5, depthwise off", ("optim.l2", 4e-5)),
        ("V1 slim script", "dropout", "keep .999", ("model.dropout", 1e-3)),
        ("V1 slim script", "BN decay / eps", ".9997 / 1e-3", ("model.bn_decay", 0.9997)),
        ("V1 slim script", "EMA", "none", ("ema.decay", 0.0)),
        (
            "V1/V2 TF official",
            "LR, schedule",
            "=.008 B/128.*x.94 .V1. .* 2.5 ep",
            ("optim.lr_per_256", 0.016),
        ),
        ("V1/V2 TF official", "LR, schedule", "x.94 .V1. .* 2.5 ep", ("optim.decay_factor", 0.94)),
        ("V1/V2 TF official", "LR, schedule", "/ 2.5 ep", ("optim.decay_epochs", 2.5)),
        ("V1/V2 TF official", "warmup", "5 ep", ("optim.warmup_epochs", 5.0)),
        ("V1/V2 TF official", "batch", "4096", ("data.batch_size", 4096)),
        ("V1/V2 TF official", "epochs", "500", ("train.epochs", 500.0)),
    ],
    "v2": [
        ("V2 paper", "optimizer", "RMSprop decay .9 mom .9", ("optim.rms_decay", 0.9)),
        ("V2 paper", "optimizer", "RMSprop decay .9 mom .9", ("optim.momentum", 0.9)),
        ("V2 paper", "LR, schedule", ".045, x.98 / epoch", ("optim.decay_factor", 0.98)),
        ("V2 paper", "LR, schedule", ".045, x.98 / epoch", ("optim.decay_epochs", 1.0)),
        ("V2 paper", "WD", "4e-5", ("optim.l2", 4e-5)),
        ("V2 slim README", "EMA", ".9999", ("ema.decay", 0.9999)),
        ("V2 slim README", "batch", "96 per clone, 8 GPUs", ("data.batch_size", 768)),
        ("V2 slim README", "epochs", "700k steps", ("train.steps", 700_000)),
        ("V2 slim README", "augment, smoothing", "LS .1", ("train.label_smoothing", 0.1)),
        ("V2 slim README", "dropout", "keep .8", ("model.dropout", 0.2)),
        ("V2 slim README", "BN decay / eps", ".997 / 1e-3", ("model.bn_decay", 0.997)),
    ],
    "v3_large": [
        ("V3 paper", "optimizer", "TF RMSprop mom .9", ("optim.momentum", 0.9)),
        ("V3 paper", "LR, schedule", ".1, .*read: x.99", ("optim.lr_per_256", 0.1 * 256 / 4096)),
        ("V3 paper", "LR, schedule", "every 3 epochs.*x.99", ("optim.decay_factor", 0.99)),
        ("V3 paper", "WD", "1e-5", ("optim.l2", 1e-5)),
        ("V3 paper", "EMA", ".9999", ("ema.decay", 0.9999)),
        ("V3 paper", "batch", "4096", ("data.batch_size", 4096)),
        ("V3 paper", "dropout", "keep prob", ("model.dropout", 0.2)),
        ("V3 paper", "BN decay / eps", ".99 / n/s", ("model.bn_decay", 0.99)),
        ("V3 slim README", "optimizer", "decay .9 mom .9 .*eps .002", ("optim.epsilon", 0.002)),
        ("V3 slim README", "optimizer", "decay .9 mom .9 .*eps .002", ("optim.rms_decay", 0.9)),
        ("V3 slim README", "warmup", "5 ep", ("optim.warmup_epochs", 5.0)),
        ("V3 slim README", "augment, smoothing", "LS .1", ("train.label_smoothing", 0.1)),
        ("V3-S TF official", "epochs", "1000", ("train.epochs", 1000.0)),
    ],
    "v4:conv_small": [
        ("V4 Conv-S TF", "optimizer", "AdamW beta1 .6 eps 1e-6", ("optim.beta1", 0.6)),
        ("V4 Conv-S TF", "optimizer", "AdamW beta1 .6 eps 1e-6", ("optim.epsilon", 1e-6)),
        ("V4 Conv-S TF", "LR, schedule", ".002 cosine", ("optim.lr_per_256", 0.002 * 256 / 4096)),
        ("V4 Conv-S TF", "warmup", "5 ep", ("optim.warmup_epochs", 5.0)),
        ("V4 Conv-S TF", "WD", r".01 .\+L2 1e-5", ("optim.weight_decay", 0.01)),
        ("V4 Conv-S TF", "WD", r".01 .\+L2 1e-5", ("optim.l2", 1e-5)),
        ("V4 Conv-S TF", "EMA", ".9999", ("ema.decay", 0.9999)),
        ("V4 Conv-S TF", "batch", "4096", ("data.batch_size", 4096)),
        ("V4 Conv-S TF", "epochs", "9,623", ("train.epochs", 9623.0)),
        ("V4 Conv-S TF", "augment, smoothing", "m9 p.5, LS .1", ("data.randaugment_magnitude", 9)),
        ("V4 Conv-S TF", "augment, smoothing", "m9 p.5, LS .1", ("data.randaugment_probability", 0.5)),
        ("V4 Conv-S TF", "dropout", "^.3", ("model.dropout", 0.3)),
        ("V4 Conv-S TF", "BN decay / eps", ".95 / 1e-6", ("model.bn_decay", 0.95)),
        ("V4 Conv-S TF", "BN decay / eps", ".95 / 1e-6", ("model.bn_epsilon", 1e-6)),
    ],
    "v4:conv_medium": [
        ("V4 Conv-M", "LR, schedule", ".004 cosine", ("optim.lr_per_256", 0.004 * 256 / 4096)),
        ("V4 Conv-M", "warmup", "5 ep", ("optim.warmup_epochs", 5.0)),
        ("V4 Conv-M", "WD", "^.1$", ("optim.weight_decay", 0.1)),
        ("V4 Conv-M", "batch", "4096", ("data.batch_size", 4096)),
        ("V4 Conv-M", "epochs", "500 @256", ("data.image_size", 256)),
        ("V4 Conv-M", "augment, smoothing", "p.7, LS .1", ("data.randaugment_probability", 0.7)),
        ("V4 Conv-M", "dropout", "drop path .075", ("model.drop_path", 0.075)),
        ("V4 Conv-M", "BN decay / eps", ".997 / 1e-3", ("model.bn_decay", 0.997)),
    ],
    "v4:conv_large": [
        ("V4 Conv-L", "LR, schedule", ".004 cosine", ("optim.lr_per_256", 0.004 * 256 / 16384)),
        ("V4 Conv-L", "warmup", "1560 steps .20 ep", ("optim.warmup_epochs", 20.0)),
        ("V4 Conv-L", "WD", "^.2$", ("optim.weight_decay", 0.2)),
        ("V4 Conv-L", "batch", "16384", ("data.batch_size", 16384)),
        ("V4 Conv-L", "epochs", "500 @384", ("data.image_size", 384)),
        ("V4 Conv-L", "augment, smoothing", "mixup .8/cutmix 1 p.2", ("data.mixup", 0.8)),
        ("V4 Conv-L", "augment, smoothing", "mixup .8/cutmix 1 p.2", ("data.mix_probability", 0.2)),
        ("V4 Conv-L", "dropout", "dp .2 flat", ("model.drop_path", 0.2)),
        ("V4 Conv-L", "dropout", "dp .2 flat", ("model.drop_path_flat", True)),
    ],
    "v4:hybrid_medium": [
        ("V4 Hyb-M / L", "LR, schedule", "^.016", ("optim.lr_per_256", 0.016 * 256 / 16384)),
        ("V4 Hyb-M / L", "WD", "^.1 /", ("optim.weight_decay", 0.1)),
        ("V4 Hyb-M / L", "epochs", "39k steps @256", ("data.image_size", 256)),
        ("V4 Hyb-M / L", "augment, smoothing", "p.7", ("data.randaugment_probability", 0.7)),
        ("V4 Hyb-M / L", "dropout", "dp .075 /", ("model.drop_path", 0.075)),
        ("V4 Hyb-M / L", "EMA", "none", ("ema.decay", 0.0)),
    ],
    "v4:hybrid_large": [
        ("V4 Hyb-M / L", "LR, schedule", "/ .01 cosine", ("optim.lr_per_256", 0.01 * 256 / 16384)),
        ("V4 Hyb-M / L", "WD", "/ .2$", ("optim.weight_decay", 0.2)),
        ("V4 Hyb-M / L", "epochs", "L @384", ("data.image_size", 384)),
        ("V4 Hyb-M / L", "augment, smoothing", "mix p.3", ("data.mix_probability", 0.3)),
        ("V4 Hyb-M / L", "dropout", "/ .35", ("model.drop_path", 0.35)),
        ("V4 Hyb-M / L", "BN decay / eps", ".997", ("model.bn_decay", 0.997)),
    ],
}


@pytest.mark.parametrize("recipe", CITED)
def test_imagenet_recipe_agrees_with_the_rows_it_cites(recipe):
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    table = [line.replace("**", "").strip("| ").split(" | ") for line in lines if line.count(" | ") > 9]
    header = next(row for row in table if row[0] == "recipe")
    columns = {name.split(" (")[0]: i for i, name in enumerate(header)}
    file, _, size = recipe.partition(":")
    flat = flatten_config(get_config(file, f"{size},imagenet" if size else "imagenet"))
    source = (ROOT / "configs" / f"{file}.py").read_text()
    for name, column, pattern, (key, value) in CITED[recipe]:
        row = next(row for row in table if row[0].startswith(name))
        assert re.search(pattern, row[columns[column]]), (name, column)
        assert flat[key] == pytest.approx(value), key
        assert f'"{name}"' in source, name
    if size != "conv_small":
        assert flat["model.bn_epsilon"] == 1e-3


def test_v2_learning_rate_is_that_of_one_worker():
    optim = get_config("v2", "imagenet").optim
    assert optim.lr_per_256 * 96 / 256 == pytest.approx(0.045)  # 1801.04381 sec. 6.1


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "no_figures")
def test_hybrid_v4_on_digits_takes_steps(tmp_path, monkeypatch):
    """With 11 rows of 31, which compile in a third of the time: some of each kind, and the narrowest and widest."""
    make = zoo.MODELS["mobilenet_v4_hybrid_medium"]

    def make_short(**arguments):
        spec = make(**arguments)
        return dataclasses.replace(spec, blocks=(*spec.blocks[:9], *spec.blocks[-2:]))

    monkeypatch.setitem(zoo.MODELS, "mobilenet_v4_hybrid_medium", make_short)
    config = get_config("v4", "hybrid_medium,digits")
    assert config.name == "mobilenet_v4_hybrid_medium_digits"
    config.model.width = 0.25
    config.model.lowering = "plain"  # compiles faster
    config.data.batch_size = 16
    config.train.steps = 3
    config.train.log_every_steps = 1
    result = train_and_evaluate(config, tmp_path)
    assert (result["step"], result["count"]) == (3, 360)
    assert math.isfinite(result["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("one_device", "no_figures")
def test_imagenet_recipe_runs_three_steps(recipe, tmp_path):
    config = get_config(recipe, "imagenet")
    config.model.width = 0.25
    config.model.lowering = "plain"  # compiles in half the time
    config.model.shallow = True
    config.data.update({"source": "fake:64", "num_classes": 1000, "image_size": 32, "workers": 0})
    config.data.update({"batch_size": 8, "eval_batch_size": 64})
    config.train.steps = 3
    config.train.log_every_steps = 1
    result = train_and_evaluate(config, tmp_path)
    assert result["step"] == 3
    assert result["count"] > 0
    assert abs(result["loss"] - math.log(1000)) < 1  # three steps of warm-up: chance
