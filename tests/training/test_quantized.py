"""Quantization-aware training: what is trained is what an int8 file computes."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from processes import SPEC, make_tiny_spec
from runs import assert_same_run, make_config, read_result

from mobilenet_jax.data.loader import TrainIterator, make_eval_batches
from mobilenet_jax.data.sources import eval_split, open_source
from mobilenet_jax.exporting.export import export_weights
from mobilenet_jax.exporting.graph import build_graph
from mobilenet_jax.exporting.integer import list_ranges
from mobilenet_jax.exporting.runtime import TFLiteRuntime
from mobilenet_jax.models import zoo
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.training.quantized import CALIBRATION_BATCHES, QuantizedNetwork
from mobilenet_jax.training.run import RefusedError, evaluate_run, train_and_evaluate
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir.checkpoint import read_checkpoint
from tests.cards import make_test_card
from tests.exporting.networks import draw_variables

pytestmark = pytest.mark.usefixtures("one_device", "tiny")
SIZE = 16


@pytest.fixture(scope="module")
def tiny():
    """The model "tiny", under which configs find `processes.SPEC`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", make_tiny_spec)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny) -> Path:
    """Weights whose batch norm is not the identity, to begin from."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = create_model("tiny", num_classes=10)
    card = make_test_card(model.spec)
    save_weights(path, model, draw_variables(model.spec), card)
    return path


def make_int8_config(weights: Path, **values) -> Any:
    settings: dict = {
        "model__name": "tiny",
        "model__width": 1.0,
        "model__shallow": None,
        "model__stride_one": (),
        "init": str(weights),
        "train__quantize": "int8",
        "train__steps": 8,
        "train__range_decay": 0.8,
        "train__freeze_ranges_epochs": 0.09,  # 4 of the 44.9 steps of an epoch
        "train__save_every_epochs": 0.045,  # 2 steps
        "train__keep_checkpoints": 9,
        "optim__lr_per_256": 0.1,
        "ema__decay": 0.5,
        **values,
    }
    return make_config(**settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, show_one_device, weights) -> Path:
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("run") / "int8"
    with show_one_device():
        train_and_evaluate(make_int8_config(weights), workdir)
    return workdir


def test_the_file_answers_every_image_as_the_run_does(trained, weights, tmp_path):
    """Exporting needs no calibration; accuracy and loss of the last evaluation come out of LiteRT."""
    config = make_int8_config(weights)
    found = export_weights(trained, format="tflite", quantize="int8", batch="dynamic", out=tmp_path)
    runtime = TFLiteRuntime(Path(found["file"]).read_bytes())
    source = open_source(config.data, eval_split(config.data))
    batches, count = make_eval_batches(config.data, process_index=0, process_count=1, device_count=1, source=source)
    right, loss = 0, 0.0
    for batch in batches:
        mask, labels = batch["mask"], batch["labels"]
        logits = runtime(np.asarray(normalise_images(jnp.asarray(batch["images"]), config.data.mean, config.data.std)))
        right += int(((logits.argmax(-1) == labels) & mask).sum())
        chances = jax.nn.log_softmax(jnp.asarray(logits))
        loss -= float(jnp.sum(jnp.where(mask, chances[jnp.arange(len(labels)), labels], 0)))
    result = read_result(trained)
    assert right / count == result["top1"]
    assert loss / count == pytest.approx(result["loss"], rel=1e-6)


def test_ranges_move_and_stay_for_the_last_epochs(trained, weights):
    leaves = {step: read_checkpoint(trained / "checkpoints" / str(step))[0] for step in (2, 4, 8)}
    names = {name for name in leaves[8] if name.startswith("ranges.")}
    assert {name.removeprefix("ranges.") for name in names} == set(list_ranges(build_graph(SPEC, SIZE)))
    assert any(not np.array_equal(leaves[2][name], leaves[4][name]) for name in names)
    assert all(np.array_equal(leaves[4][name], leaves[8][name]) for name in names)
    # Batch norm stays as the weights have it, and all parameters move.
    given: dict = traverse_util.flatten_dict(draw_variables(create_model("tiny", num_classes=10).spec), sep=".")
    for name, leaf in given.items():
        assert np.array_equal(leaves[8][name], leaf) == name.startswith("batch_stats"), name


def stop_in(monkeypatch, step: int) -> None:
    """Have a signal come in a step; the batches that ranges are measured on are read before it."""
    original, calls = TrainIterator.__next__, itertools.count(1)

    def next_batch(self):
        if next(calls) == CALIBRATION_BATCHES + step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(TrainIterator, "__next__", next_batch)


def test_a_run_continues_to_the_same_bits(trained, weights, tmp_path, monkeypatch):
    """From a step before the ranges are frozen."""
    config, step = make_int8_config(weights), 3
    with monkeypatch.context() as patch:
        stop_in(patch, step)
        assert train_and_evaluate(config, tmp_path)["step"] == step
    assert train_and_evaluate(config, tmp_path) == read_result(trained)
    assert_same_run(trained, tmp_path)


def test_evaluation_runs_the_int8_network(trained, weights):
    found = evaluate_run(make_int8_config(weights), trained)
    assert found["eval_ema/loss"] == read_result(trained)["loss"]


def test_a_float_run_does_not_become_an_int8_run(trained, weights):
    with pytest.raises(RefusedError, match=r"train.quantize was 'int8' and is None"):
        train_and_evaluate(make_int8_config(weights, train__quantize=None), trained)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("init", "", "init is empty"),
        ("model__dtype", "bfloat16", "model.dtype is 'bfloat16'"),
        ("train__recompute_stats_epochs", 1.0, "train.recompute_stats_epochs is not 0"),
        ("train__quantize", "int4", "train.quantize is 'int4'; valid: int8"),
    ],
)
def test_impossible_values_are_refused(weights, tmp_path, key, value, said):
    with pytest.raises(RefusedError, match=said):
        train_and_evaluate(make_int8_config(weights, **{key: value}), tmp_path)


# The network by itself.

VARIABLES = draw_variables(SPEC)
IMAGES = np.random.default_rng(0).normal(size=(8, SIZE, SIZE, 3)).astype(np.float32)
WIDE = {name: np.array([-12, 12], np.float32) for name in list_ranges(build_graph(SPEC, SIZE))}


@pytest.fixture(scope="module")
def gradients(show_one_device) -> tuple[Any, Any, Any]:
    """Gradients of a loss by the parameters in float and in int8, and the ranges after one step."""
    target = np.random.default_rng(1).normal(size=(8, SPEC.num_classes)).astype(np.float32)

    def lose(logits):
        return jnp.mean((logits - target) ** 2)

    float_net, int8_net = MobileNet(SPEC, freeze_stats=True), QuantizedNetwork(SPEC, SIZE, decay=0.75)

    @jax.jit
    def run(params):
        variables = {**VARIABLES, "ranges": WIDE}

        def lose_int8(params):
            given = {**variables, "params": params}
            logits, updated = int8_net.apply(given, IMAGES, train=True, mutable=["batch_stats", "ranges"])
            return lose(logits), updated

        def lose_float(params):
            return lose(float_net.apply({**VARIABLES, "params": params}, IMAGES))

        return jax.grad(lose_float)(params), *jax.grad(lose_int8, has_aux=True)(params)

    with show_one_device():
        return jax.device_get(run(VARIABLES["params"]))


def test_gradients_pass_the_roundings(gradients):
    """Each tensor's gradient points where the gradient of the float network points."""
    wanted, got = (dict[str, Any](traverse_util.flatten_dict(tree, sep="/")) for tree in gradients[:2])
    for name in wanted:
        a, b = np.ravel(wanted[name]), np.ravel(got[name])
        assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b) > 0, name
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.25), name


def test_ranges_are_a_moving_average_of_what_int8_would_round(gradients):
    updated = gradients[2]
    assert set(updated) == {"batch_stats", "ranges"}
    extremes = np.array([IMAGES.min(), IMAGES.max()])
    np.testing.assert_allclose(updated["ranges"]["images"], 0.75 * WIDE["images"] + 0.25 * extremes, rtol=1e-6)
    low, high = updated["ranges"]["stem"]  # behind a ReLU6
    assert low == pytest.approx(0.75 * -12, rel=1e-6)
    assert 0.75 * 12 < high <= 0.75 * 12 + 0.25 * 6 + 1e-5
