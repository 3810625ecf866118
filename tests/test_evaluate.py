import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import base
from mobilenet_jax.data.loader import make_eval_batches
from mobilenet_jax.data.sources import describe, open_source
from mobilenet_jax.evaluate import evaluate
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.sharding import make_mesh, replicate, shard_eval_step
from mobilenet_jax.steps import eval_step
from mobilenet_jax.train import build_model

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
    metrics, confusion = evaluate_answers(logits, labels, size=64)
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


@pytest.mark.parametrize(("size", "devices"), [(1, 1), (7, 1), (50, 1), (64, 1), (8, 8), (24, 8), (64, 8)])
def test_trap_22_and_trap_23_batch_size_and_devices_change_nothing(size, devices):
    logits, labels = make_answers(50, 6, levels=9)
    want, want_confusion = evaluate_answers(logits, labels, size=10)
    got, confusion = evaluate_answers(logits, labels, size=size, devices=devices)
    for name in ("top1", "top5", "count"):
        assert got[name] == want[name]
    # Sums of 50 float32 in another order: a few roundings of 6e-8.
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
    np.testing.assert_array_equal(confusion, want_confusion)


@pytest.mark.parametrize("count", [49, 51])
def test_another_count_than_the_data_sets_is_an_error(count):
    logits, labels = make_answers(50, 6, levels=9)
    with pytest.raises(RuntimeError, match=f"evaluation saw 50 images instead of {count}"):
        evaluate_answers(logits, labels, size=8, count=count)


def test_no_batches_is_an_error():
    logits, labels = make_answers(0, 6, levels=9)
    with pytest.raises(RuntimeError, match="saw 0 images instead of 50"):
        evaluate_answers(logits, labels, size=8, count=50)


def test_logits_that_are_not_numbers_show_in_the_loss():
    logits, labels = make_answers(16, 6, levels=9)
    logits[3] = 255
    assert np.isnan(evaluate_answers(logits, labels, size=8)[0]["loss"])


def test_no_confusion_matrix_above_a_hundred_classes():
    for classes, there in ((100, True), (101, False)):
        _, confusion = evaluate_answers(*make_answers(16, classes, levels=200), size=8)
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


def test_trap_26_a_background_class_of_the_model_leaves_the_labels_alone():
    """A network may have more outputs than the data has classes; those at the end are then never true."""
    config = _digits_config(num_classes=11)
    labels = [open_source(config.data, "test")[i].label for i in range(360)]
    counts = np.bincount(labels, minlength=11)
    assert counts[10] == 0
    metrics, confusion = _evaluate_constant(config, favourite=10)
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
    metrics, confusion = _evaluate_constant(config, favourite=0)
    assert metrics["count"] == 360
    assert metrics["top1"] * 360 == labels.count(0)
    # Of equal logits the first come first: 0, then 1 to 4.
    assert metrics["top5"] * 360 == sum(label < 5 for label in labels)
    want = np.log(np.e + 9) - labels.count(0) / 360
    assert metrics["loss"] == pytest.approx(want, rel=1e-6)
    assert confusion is not None
    np.testing.assert_array_equal(confusion[:, 0], np.bincount(labels))
