"""What a run starts from."""

import logging
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from runs import make_config, read_result
from safetensors.numpy import save_file

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training.config import CARD_KEYS
from mobilenet_jax.training.run import RefusedError, evaluate_run, prepare, train_and_evaluate
from mobilenet_jax.weights.card import HALF, Preprocessing
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.weights.torch_names import TORCHVISION
from mobilenet_jax.workdir.checkpoint import read_checkpoint
from tests.cards import make_test_card

pytestmark = pytest.mark.usefixtures("one_device")


def test_init_takes_the_averages_of_another_run_and_evaluates_what_is_held_out(finished, tmp_path):
    config = make_config(init=str(finished), data__holdout=0.3)
    with prepare(config, tmp_path) as run:
        source, _ = read_checkpoint(finished)
        for part in ("params", "batch_stats"):
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(run.start.state, part)):
                name = f"ema.{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
                np.testing.assert_array_equal(np.asarray(leaf), source[name])
    info = run.setup.info
    assert run.start.step == 0
    assert info.train_count + info.eval_count == 1437
    assert evaluate_run(config, tmp_path)["eval/count"] == info.eval_count == pytest.approx(0.3 * 1437, abs=10)


def test_init_of_another_width_or_of_nothing_is_refused(finished, tmp_path):
    with pytest.raises(RefusedError, match="does not fit the model"):
        train_and_evaluate(make_config(init=str(finished), model__width=0.25), tmp_path)
    with pytest.raises(RefusedError, match=r"there are no weights .*nothing; valid: a file"):
        train_and_evaluate(make_config(init=str(tmp_path / "nothing")), tmp_path)


def test_init_takes_a_file_of_another_framework_if_its_sums_are_the_models(tmp_path):
    model = create_model("mobilenet_v2", width=0.25, num_classes=10, convention="torchvision")
    variables = init_variables(model, seed=5)
    path = tmp_path / "w.pth"
    card = {"name": "", "model": "mobilenet_v2", "width": 0.25, "convention": "torchvision"}
    card |= {"preprocessing": asdict(HALF), "class_names": None, "source": {}, "metrics": {}, "notes": []}
    save_weights(path, model, variables, card, format="torchvision")
    here = {"model__name": "mobilenet_v2", "model__width": 0.25, "model__shallow": None, "init": str(path)}
    with pytest.raises(
        ValueError, match=r"padding symmetric and bn_epsilon 1e-05, .*set model.convention to torchvision"
    ):
        train_and_evaluate(make_config(**here), tmp_path / "run")
    with prepare(make_config(**here, model__convention="torchvision"), tmp_path / "run") as run:
        for found, expected in zip(
            jax.tree.leaves(run.start.state.params), jax.tree.leaves(variables["params"]), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(found), expected)
    with pytest.raises(ValueError, match="does not fit torchvision/mobilenet_v3_small"):
        train_and_evaluate(make_config(**here, init_name="torchvision/mobilenet_v3_small"), tmp_path / "run")


def test_a_run_is_weights_with_a_card(finished):
    model, variables, card = load_weights(finished, lowering="plain")
    leaves, meta = read_checkpoint(finished)
    for part in ("params", "batch_stats"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables[part]):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            np.testing.assert_array_equal(leaf, leaves[f"ema.{part}.{name}"])
    assert (model.lowering, model.spec.num_classes, model.spec.stem.stride) == ("plain", 10, 1)
    assert (card["name"], card["model"], card["width"]) == ("mobilenet_v2", "mobilenet_v1", 0.1)
    assert card["preprocessing"] == {key: meta["config"][f"data.{key}"] for key in asdict(HALF)}
    assert card["class_names"] == list("0123456789")
    assert card["metrics"]["eval_ema/top1"] == read_result(finished)["top1"]
    # Any checkpoint of the run by its folder, and the whole of it in one file.
    step = max(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert card["source"]["file"] == f"finished, step {step}"
    assert load_weights(finished / "checkpoints" / str(step))[2]["source"]["sha256"] == card["source"]["sha256"]
    save_weights(finished.parent / "w.safetensors", model, variables, card)
    assert load_weights(finished.parent / "w.safetensors", lowering="plain")[0::2] == (model, card)


def test_init_starts_a_classifier_of_other_classes_afresh(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    config = make_config(init=str(finished), data__source="fake:64", data__num_classes=4)
    with prepare(config, tmp_path) as run:
        assert run.start.state.params["classifier"]["kernel"].shape[-1] == 4
    assert "classifier starts afresh" in caplog.text


def test_frozen_parts_stay_as_they_were(tmp_path):
    config = make_config(optim__freeze=("^stem/", "^block_"), train__steps=2, optim__l2=0.1)
    with prepare(config, tmp_path) as run:
        before = jax.tree.map(np.array, run.start.state.params)
    train_and_evaluate(config, tmp_path)
    after, _ = read_checkpoint(tmp_path)
    for name, part in before.items():
        same = [
            np.array_equal(leaf, after[f"params.{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}"])
            for path, leaf in jax.tree_util.tree_leaves_with_path(part)
        ]
        assert all(same) == name.startswith(("stem", "block_")), name


def make_card_file(path: Path) -> Path:
    """Weights of five classes whose card has a preprocessing of its own."""
    model = create_model("mobilenet_v3_small", width=0.35, num_classes=5, convention="torchvision")
    card = make_test_card(
        model.spec,
        name="mine",
        width=0.35,
        convention="torchvision",
        preprocessing=Preprocessing((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), 40, 0.9, "bicubic"),
    )
    save_weights(path, model, init_variables(model, seed=1), card)
    return path


FROM_CARD: dict = {"model__shallow": None} | {key.replace(".", "__"): None for key in CARD_KEYS}


def test_trap_24_network_and_preprocessing_are_those_of_the_weights_unless_set(tmp_path, caplog):
    weights = make_card_file(tmp_path / "w.safetensors")
    config = make_config(**{**FROM_CARD, "model__stride_one": (), "init": str(weights), "data__crop_share": 0.8})
    with prepare(config, tmp_path / "run") as run:
        data, saved = run.setup.config.data, run.setup.flat_config
        assert (data.image_size, data.crop_share, data.interpolation) == (40, 0.8, "bicubic")
        assert (tuple(data.mean), tuple(data.std)) == ((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
        assert (
            run.setup.model.spec
            == create_model(
                "mobilenet_v3_small", width=0.35, num_classes=10, convention="torchvision", dropout=0.2, bn_decay=0.9
            ).spec
        )
        assert None not in [saved[key] for key in CARD_KEYS]
        assert run.start.state.params["classifier"]["kernel"].shape[-1] == 10
    assert "was trained with other preprocessing: data.crop_share is 0.8, there 0.9" in caplog.text
    assert config.data.image_size is None  # the caller's config is as it was


def test_a_config_that_follows_weights_needs_some(tmp_path):
    with pytest.raises(ValueError, match=r"model\.name, .* are none: as the weights have them; set init") as error:
        train_and_evaluate(make_config(**FROM_CARD), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_init_takes_the_backbone_of_a_file_with_another_head(tmp_path):
    model = create_model("mobilenet_v2", width=0.25, num_classes=0, convention="torchvision")
    variables = init_variables(model, seed=5)
    flat = traverse_util.flatten_dict(variables)
    tensors = {
        name: slot.to_tensor(np.asarray(flat[slot.path])) for name, slot in TORCHVISION.list_slots(model.spec).items()
    }
    head = {"head.0.weight": np.ones((4, 1280), np.float32), "head.2.weight": np.ones((4, 4), np.float32)}
    path = str(tmp_path / "w.safetensors")
    save_file({name: np.ascontiguousarray(t) for name, t in {**tensors, **head}.items()}, path)
    here = {"model__name": "mobilenet_v2", "model__width": 0.25, "model__convention": "torchvision", "init": path}
    here["model__shallow"] = None
    with pytest.raises(ValueError, match=r'classifier="drop"'):
        train_and_evaluate(make_config(**here), tmp_path / "run")
    with prepare(make_config(**here, init_classifier="drop"), tmp_path / "run") as run:
        params = run.start.state.params
        np.testing.assert_array_equal(params["stem"]["conv"]["kernel"], variables["params"]["stem"]["conv"]["kernel"])
        assert params["classifier"]["kernel"].shape == (1280, 10)
