import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import base, fashion_mnist
from mobilenet_jax.data.loader import make_eval_batches
from mobilenet_jax.data.sources import describe, open_source
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.training import evaluate as evaluate_module
from mobilenet_jax.training.build import build_model
from mobilenet_jax.training.classes import match_classes
from mobilenet_jax.training.evaluate import evaluate, evaluate_all, evaluate_weights
from mobilenet_jax.training.sharding import make_mesh, replicate, shard_eval_step
from mobilenet_jax.training.steps import eval_step
from mobilenet_jax.weights.load import load_weights

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # the pixels as they are


class Pixels(nn.Module):
    """Logits [B, W] that are the red pixels of the first row: an image says what the network answers."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        assert not train
        red = images[:, 0, :, 0]
        return jnp.where(red == 255, jnp.nan, red)


def make_answers(count: int, classes: int, *, levels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of few levels, and so with ties, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (count, classes), np.uint8), rng.integers(0, classes, count, np.int32)


def make_batches(logits: np.ndarray, labels: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
    """Batches for `Pixels`; the last is filled up with images of class 0 whose logits are NaN."""
    batches = []
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        missing = size - len(labels[rows])
        answers = np.pad(logits[rows], ((0, missing), (0, 0)), constant_values=255)
        batches.append(
            {
                "images": np.broadcast_to(answers[:, None, :, None], (size, 1, logits.shape[1], 3)),
                "labels": np.pad(labels[rows], (0, missing)),
                "mask": np.arange(size) < len(labels[rows]),
            }
        )
    return batches


def evaluate_answers(logits: np.ndarray, labels: np.ndarray, *, size: int, devices: int = 1, count=None):
    mesh = make_mesh(jax.devices()[:devices])
    step = shard_eval_step(functools.partial(eval_step, model=Pixels(), **PLAIN), mesh)
    count = len(labels) if count is None else count
    return evaluate(step, {}, make_batches(logits, labels, size), count=count, mesh=mesh)


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_metrics_equal_numpys_on_logits_with_ties(classes):
    logits, labels = make_answers(203, classes, levels=4)
    metrics, per_class, confusion = evaluate_answers(logits, labels, size=64)
    order = np.argsort(-logits.astype(np.int64), axis=1, kind="stable")  # of equals the first counts
    assert metrics["count"] == 203
    assert metrics["top1"] == (order[:, 0] == labels).sum() / 203
    assert metrics["top5"] == (order[:, :5] == labels[:, None]).any(1).sum() / 203
    wide = logits.astype(np.float64)
    losses = np.log(np.exp(wide).sum(1)) - wide[np.arange(203), labels]
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    want = np.zeros((classes, classes), np.int64)
    np.add.at(want, (labels, order[:, 0]), 1)
    np.testing.assert_array_equal(confusion, want)
    np.testing.assert_array_equal(per_class, [want.sum(1), want.diagonal()])
    # Guo et al. 2017, equation 3, bin by bin.
    confidence = (np.exp(wide) / np.exp(wide).sum(1, keepdims=True)).max(1)
    error = 0.0
    for low in range(15):
        low_edge, high_edge = low / 15 + 1e-6, (low + 1) / 15 + 1e-6  # three equal logits have a third, and are below
        inside = (confidence > low_edge) & (confidence <= high_edge)
        if inside.any():
            right = (order[:, 0] == labels)[inside].mean()
            error += inside.sum() / 203 * abs(right - confidence[inside].mean())
    assert metrics["ece"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(("size", "devices"), [(1, 1), (7, 1), (50, 1), (64, 1), (8, 8), (24, 8), (64, 8)])
def test_trap_22_and_trap_23_batch_size_and_devices_change_nothing(size, devices):
    logits, labels = make_answers(50, 6, levels=9)
    want, want_classes, want_confusion = evaluate_answers(logits, labels, size=10)
    got, per_class, confusion = evaluate_answers(logits, labels, size=size, devices=devices)
    for name in ("top1", "top5", "count"):
        assert got[name] == want[name]
    # Sums of 50 float32 in another order: a few roundings of 6e-8.
    for name in ("loss", "ece"):
        assert got[name] == pytest.approx(want[name], rel=1e-6)
    np.testing.assert_array_equal(per_class, want_classes)
    np.testing.assert_array_equal(confusion, want_confusion)


@pytest.mark.parametrize("count", [49, 51])
def test_another_count_than_the_data_sets_is_an_error(count):
    logits, labels = make_answers(50, 6, levels=9)
    with pytest.raises(RuntimeError, match=f"evaluation saw 50 images instead of {count}"):
        evaluate_answers(logits, labels, size=8, count=count)


def test_several_sets_of_variables_share_one_reading_of_the_images():
    logits, labels = make_answers(100, 3, levels=9)
    mesh = make_mesh(jax.devices()[:1])

    def scaled_step(variables, batch):
        answers = {**batch, "images": batch["images"] * variables["sign"]}
        return eval_step({}, answers, model=Pixels(), **PLAIN)

    kinds = {"plain": {"sign": np.uint8(1)}, "none": {"sign": np.uint8(0)}}
    batches = iter(make_batches(logits, labels, 16))  # can be read once
    found = evaluate_all(shard_eval_step(scaled_step, mesh), kinds, batches, count=100, mesh=mesh)
    assert found["plain"].metrics == evaluate_answers(logits, labels, size=16).metrics
    assert found["none"].metrics["top1"] == (labels == 0).mean()  # of equal logits the first wins


def test_no_batches_is_an_error():
    logits, labels = make_answers(0, 6, levels=9)
    with pytest.raises(RuntimeError, match="saw 0 images instead of 50"):
        evaluate_answers(logits, labels, size=8, count=50)


def test_calibration_of_a_sure_and_of_an_unsure_network():
    labels = np.array([0] * 3 + [1], np.int32)
    sure = np.tile(np.array([200, 0], np.uint8), (4, 1))  # probability 1, right 3 times of 4
    assert evaluate_answers(sure, labels, size=4)[0]["ece"] == pytest.approx(0.25)
    even = np.zeros((4, 2), np.uint8)  # probability 1/2
    assert evaluate_answers(even, labels[[0, 1, 3, 3]], size=3)[0]["ece"] == pytest.approx(0, abs=1e-6)


def test_logits_that_are_not_numbers_show_in_the_loss():
    logits, labels = make_answers(16, 6, levels=9)
    logits[3] = 255
    assert np.isnan(evaluate_answers(logits, labels, size=8)[0]["loss"])


def test_no_confusion_matrix_above_a_hundred_classes():
    for classes, there in ((100, True), (101, False)):
        _, _, confusion = evaluate_answers(*make_answers(16, classes, levels=200), size=8)
        assert (confusion is not None) == there


def _digits_config(**model) -> Any:
    config: Any = base.get_config()
    config.model.update({"name": "mobilenet_v3_small_minimalistic", "width": 0.25, **model})
    config.data.image_size = 32
    config.data.eval_batch_size = 112  # 360 images: the last batch holds 24
    return config


def _evaluate_constant(config, favourite: int):
    """Evaluate on digits a network that answers `favourite` whatever it sees."""
    model = build_model(config, describe(config.data))
    variables = init_variables(model, seed=0)
    classifier = variables["params"]["classifier"]
    classifier["kernel"][:] = 0
    classifier["bias"][favourite] = 1
    mesh = make_mesh()
    step = functools.partial(eval_step, model=model, mean=config.data.mean, std=config.data.std)
    batches, count = make_eval_batches(config.data, process_index=0, process_count=1)
    return evaluate(shard_eval_step(step, mesh), replicate(variables, mesh), batches, count=count, mesh=mesh)


WNIDS = [f"n{i:08d}" for i in range(1000)]


@pytest.mark.parametrize(
    ("known", "names", "order"),
    [
        (None, ["a", "b", "c"], [0, 1, 2]),
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["c", "a", "b"], ["a", "b", "c"], [1, 2, 0]),
        (["x", "x", "b"], ["x", "x", "b"], [0, 1, 2]),  # ImageNet has two classes called crane
        ([f"class {i}" for i in range(1000)], WNIDS, list(range(1000))),
    ],
)
def test_classes_are_matched_by_name(known, names, order):
    assert match_classes(known, len(names), names, data="set") == order


@pytest.mark.parametrize(
    ("known", "names", "said"),
    [
        (None, ["a", "b"], "set has 2 classes and the weights 3; they must be the same classes"),
        (["a", "b", "c"], ["a", "b", "d"], "of set and of the weights differ: only one of them has c, d$"),
        (["a", "b", "c"], ["d", "e", "f"], "has a, b, c, d and 2 more$"),
        (["a", "b", "c"], WNIDS[:3], "has a, b, c, n00000000 and 2 more$"),
    ],
)
def test_other_classes_are_refused(known, names, said):
    with pytest.raises(ValueError, match=said):
        match_classes(known, 3, names, data="set")


def test_weights_are_evaluated_with_classes_in_another_order():
    """A network that answers "7", whatever its class names' order, is right on the sevens."""
    config = _digits_config()
    model = build_model(config, describe(config.data))
    variables = init_variables(model, seed=0)
    names = [str(i) for i in np.random.default_rng(0).permutation(10)]
    classifier = variables["params"]["classifier"]
    classifier["kernel"][:] = 0
    classifier["bias"][names.index("7")] = np.log(3)  # probability 3 / 12
    card = {"name": "mine", "class_names": names, "source": {"file": "w", "sha256": "0"}}
    result = evaluate_weights((model, variables, card), config.data)
    labels = [open_source(config.data, "test")[i].label for i in range(360)]
    share = labels.count(7) / 360
    assert result["weights"] == {"name": "mine", "file": "w", "sha256": "0"}
    assert (result["data"], result["count"], result["top1"]) == ("digits test", 360, share)
    assert result["class_accuracy"] == {str(i): float(i == 7) for i in range(10)}
    assert result["ece"] == pytest.approx(abs(share - 0.25), rel=1e-5)
    assert result["loss"] == pytest.approx(np.log(12) - share * np.log(3), rel=1e-5)


def test_trap_26_a_background_class_of_the_model_leaves_the_labels_alone():
    """A network may have more outputs than the data has classes; those at the end are then never true."""
    config = _digits_config(num_classes=11)
    labels = [open_source(config.data, "test")[i].label for i in range(360)]
    counts = np.bincount(labels, minlength=11)
    assert counts[10] == 0
    metrics, _, confusion = _evaluate_constant(config, favourite=10)
    assert (metrics["top1"], metrics["count"]) == (0, 360)
    want = np.zeros((11, 11), np.int64)
    want[:, 10] = counts
    np.testing.assert_array_equal(confusion, want)


def test_trap_26_fewer_outputs_than_classes_are_refused():
    config = _digits_config(num_classes=9)
    with pytest.raises(ValueError, match=r"model\.num_classes is 9; digits has 10 classes"):
        build_model(config, describe(config.data))


def test_trap_22_a_constant_network_is_right_on_its_class_alone():
    config = _digits_config()
    labels = [open_source(config.data, "test")[i].label for i in range(360)]
    metrics, _, confusion = _evaluate_constant(config, favourite=0)
    assert metrics["count"] == 360
    assert metrics["top1"] * 360 == labels.count(0)
    # Of equal logits the first come first: 0, then 1 to 4.
    assert metrics["top5"] * 360 == sum(label < 5 for label in labels)
    want = np.log(np.e + 9) - labels.count(0) / 360
    assert metrics["loss"] == pytest.approx(want, rel=1e-6)
    assert confusion is not None
    np.testing.assert_array_equal(confusion[:, 0], np.bincount(labels))


@pytest.mark.slow
def test_the_weights_in_the_repository_have_the_accuracy_that_is_reported(reference, monkeypatch, optimized):
    """To the last image; where another processor's rounding turns one, it is right to see it here first."""
    monkeypatch.setattr(evaluate_module, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    data = fashion_mnist.get_config().data
    data.data_dir = str(reference / "data" / "tfds")
    weights = load_weights(RESULTS / "fashion_mnist.safetensors")
    result, reported = evaluate_weights(weights, data), json.loads((RESULTS / "fashion_mnist.json").read_text())
    assert result["count"] == reported["count"] == 10_000
    assert result["top1"] == reported["top1"] == weights[2]["metrics"]["eval_ema/top1"]
    assert result["loss"] == pytest.approx(reported["loss"], rel=1e-5)
