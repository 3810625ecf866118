"""A student learns from a teacher: the losses and gradients are the formulas, and the teacher stays as it is."""

import functools
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_run, make_config, send_at

from mobilenet_jax.data.sources import DataInfo
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec
from mobilenet_jax.training.distill import Distillation, ask_teacher, learn_from
from mobilenet_jax.training.losses import distillation_loss, mix_batch
from mobilenet_jax.training.run import RefusedError, evaluate_run, train_and_evaluate
from mobilenet_jax.training.sharding import AXIS, make_key, make_mesh, put_batch, replicate, shard_train_step
from mobilenet_jax.training.steps import StepOptions, create_state, normalise_images, train_step
from mobilenet_jax.training.teacher import load_teacher
from mobilenet_jax.weights.card import Preprocessing
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir.metrics import read_metrics
from tests.cards import make_test_card

CLASSES, SIZE, TEACHER_SIZE = 5, 16, 24
SPEC = Spec(
    name="student",
    stem=Conv(filters=8, stride=2),
    blocks=(InvertedResidual(expanded=16, filters=8),),
    head=None,
    num_classes=CLASSES,
    padding="same",
    bn_epsilon=1e-3,
    bn_decay=0.8,
    dropout=0.0,
)
STUDENT = MobileNet(SPEC, lowering="plain")  # compiles fastest
TEACHER = MobileNet(replace(SPEC, name="teacher", stem=Conv(filters=12, stride=2)), lowering="plain")
MEAN, STD = (120.0, 130.0, 140.0), (60.0, 50.0, 40.0)
TEACHER_MEAN, TEACHER_STD = (127.5, 100.0, 90.0), (127.5, 64.0, 32.0)
RNG = np.random.default_rng(0)
BATCH = {
    "images": RNG.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8),
    "labels": np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32),
}
MIX: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0}
TEMPERATURE, WEIGHT = 3.0, 0.7


@functools.cache
def make_variables(name: str) -> dict:
    variables = init_variables({"student": STUDENT, "teacher": TEACHER}[name], seed=len(name))
    rng = np.random.default_rng(1)  # statistics that are not those of a fresh network, so that folding them matters
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: np.float32(leaf + rng.uniform(0.1, 0.5, leaf.shape)), variables["batch_stats"]
    )
    # A fresh classifier gives nearly the same answer to every image.
    variables["params"]["classifier"]["kernel"] = 300 * np.asarray(variables["params"]["classifier"]["kernel"])
    return variables


def make_distillation(**changes: Any) -> Distillation:
    own_mean, own_std, mean, std = map(np.array, (MEAN, STD, TEACHER_MEAN, TEACHER_STD))
    settings: dict[str, Any] = {
        "network": TEACHER,
        "scale": tuple((own_std / std).tolist()),
        "shift": tuple(((own_mean - mean) / std).tolist()),
        "image_size": TEACHER_SIZE,
        "interpolation": "bilinear",
        "divergence": "kl",
        "temperature": TEMPERATURE,
        "weight": WEIGHT,
    }
    return Distillation(**settings | changes)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence_by_formula(kind: str, student: Any, teacher: Any, temperature: float) -> np.ndarray:
    """The definitions of Hinton et al. and of Lin, in double precision of the values."""
    q, p = (np.exp(log_softmax(np.asarray(logits, np.float64) / temperature)) for logits in (student, teacher))
    m = (p + q) / 2
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
    return temperature**2 * (kl(p, q) if kind == "kl" else (kl(p, m) + kl(q, m)) / 2)


def gradient_by_formula(kind: str, student: Any, teacher: Any, temperature: float) -> np.ndarray:
    """The derivatives for the student's logits, by hand: T (q - p) of kl, T q (log(q/m) - KL(q || m)) / 2 of js."""
    q, p = (np.exp(log_softmax(np.asarray(logits, np.float64) / temperature)) for logits in (student, teacher))
    if kind == "kl":
        return temperature * (q - p)
    logs = np.log(q / ((p + q) / 2))
    return temperature * q * (logs - (q * logs).sum(-1, keepdims=True)) / 2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["kl", "js"])
def test_losses_and_their_gradients_are_the_formulas(kind, temperature):
    student, teacher = (jnp.asarray(np.random.default_rng(i).normal(0, 3, (6, 7)), jnp.float32) for i in range(2))
    loss = functools.partial(distillation_loss, divergence=kind, temperature=temperature)
    want = divergence_by_formula(kind, student, teacher, temperature)
    np.testing.assert_allclose(loss(student, teacher), want, rtol=1e-4)
    gradient = jax.grad(lambda logits: loss(logits, teacher).sum())(student)
    np.testing.assert_allclose(gradient, gradient_by_formula(kind, student, teacher, temperature), atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_losses_of_sure_answers_are_finite_and_of_equal_answers_zero(kind):
    student, teacher = jnp.array([[300.0, -300.0]]), jnp.array([[-300.0, 300.0]])
    loss = functools.partial(distillation_loss, divergence=kind, temperature=1.0)
    np.testing.assert_allclose(loss(student, teacher), {"kl": 600.0, "js": np.log(2)}[kind], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda logits: loss(logits, teacher).sum())(student)).all()
    np.testing.assert_allclose(loss(student, student), 0, atol=1e-6)


def test_the_teacher_sees_the_same_crop_with_its_own_normalisation_and_size():
    images = normalise_images(jnp.asarray(BATCH["images"]), MEAN, STD)

    def ask(**changes):
        return np.asarray(jax.jit(functools.partial(ask_teacher, make_distillation(**changes)))(variables, images))

    variables = make_variables("teacher")
    got = ask()
    own = normalise_images(jnp.asarray(BATCH["images"]), TEACHER_MEAN, TEACHER_STD)
    own = jax.image.resize(own, (8, TEACHER_SIZE, TEACHER_SIZE, 3), "bilinear")
    np.testing.assert_allclose(got, jax.jit(TEACHER.apply)(make_variables("teacher"), own), rtol=1e-3, atol=1e-3)
    # The form that folds batch norm into the kernels answers the same; what the teacher sees matters.
    np.testing.assert_allclose(ask(network=TEACHER.clone(lowering="auto")), got, rtol=1e-3, atol=1e-3)
    for changes in ({"scale": (1.0,) * 3}, {"shift": (0.0,) * 3}, {"image_size": SIZE}):
        assert np.abs(ask(**changes) - got).max() > 0.02


def step_once(*, devices: int = 1, parallel: str = "jit", freeze_stats: bool = False, **options: Any):
    """(compiled step, arguments): one step of SGD with learning rate 1."""
    mesh, optimizer = make_mesh(jax.devices()[:devices]), optax.sgd(1.0)
    settings: dict[str, Any] = {"mean": MEAN, "std": STD, "distill": make_distillation(), **options}
    step = functools.partial(
        train_step,
        model=STUDENT.clone(freeze_stats=freeze_stats),
        optimizer=optimizer,
        options=StepOptions(**settings, axis=AXIS if parallel == "pmap" else None),
    )
    state = create_state(make_variables("student"), optimizer, ema=False)
    teacher = replicate(make_variables("teacher"), mesh)
    arguments = (replicate(state, mesh), put_batch(BATCH, mesh), make_key(0, mesh), teacher)
    return shard_train_step(step, mesh, parallel, taught=True).lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def mixed_step():
    return step_once(**MIX, label_smoothing=0.1)


def test_the_step_learns_from_both_and_its_gradient_is_the_hand_written_one(mixed_step):
    step, (state, batch, key, teacher) = mixed_step
    before = jax.device_get((state.params, teacher))
    new, sums = jax.device_get(step(jax.tree.map(jnp.copy, state), batch, key, teacher))
    mix_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    onehot = jax.nn.one_hot(BATCH["labels"], CLASSES)
    inputs = normalise_images(jnp.asarray(BATCH["images"]), MEAN, STD)
    images, targets = mix_batch(mix_key, inputs, onehot, probability=1.0, **MIX)
    assert not np.allclose(targets, onehot)
    targets = 0.9 * np.asarray(targets, np.float64) + 0.1 / CLASSES
    logits, _ = jax.jit(functools.partial(STUDENT.apply, train=True, mutable=["batch_stats"]))(
        make_variables("student"), images
    )
    answers = jax.jit(functools.partial(ask_teacher, make_distillation()))(make_variables("teacher"), images)
    logits, answers = (np.asarray(values, np.float64) for values in (logits, answers))
    taught = divergence_by_formula("kl", logits, answers, TEMPERATURE)
    labels = -(targets * log_softmax(logits)).sum(-1)
    assert sums["distill_loss"] == (pytest.approx(taught.sum(), rel=1e-3), 8)
    assert sums["loss"] == (pytest.approx(((1 - WEIGHT) * labels + WEIGHT * taught).sum(), rel=1e-3), 8)
    agreed = (logits.argmax(-1) == answers.argmax(-1)).sum()
    assert sums["teacher_agreement"] == (agreed, 8)
    # The classifier's bias has the mean of the gradients for the logits.
    gradient = (1 - WEIGHT) * (np.exp(log_softmax(logits)) - targets)
    gradient += WEIGHT * gradient_by_formula("kl", logits, answers, TEMPERATURE)
    moved = new.params["classifier"]["bias"] - before[0]["classifier"]["bias"]
    np.testing.assert_allclose(moved, -gradient.mean(0), rtol=1e-3, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(teacher), before[1])


def test_the_teacher_is_an_argument_of_the_compiled_step(mixed_step):
    step, (state, batch, key, teacher) = mixed_step
    copy = functools.partial(jax.tree.map, jnp.copy)
    other = jax.tree.map(lambda leaf: leaf * 0, teacher)
    losses = [float(step(copy(state), batch, key, given)[1]["distill_loss"][0]) for given in (teacher, other)]
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


def test_no_gradient_reaches_the_teacher():
    images = normalise_images(jnp.asarray(BATCH["images"]), MEAN, STD)
    answer = lambda variables: ask_teacher(make_distillation(), variables, images).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(answer))(make_variables("teacher"))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


def test_with_weight_1_the_labels_do_not_matter():
    logits, answers = (jnp.asarray(np.random.default_rng(i).normal(0, 3, (6, 7)), jnp.float32) for i in range(2))
    learn = functools.partial(learn_from, logits=logits, answers=answers)
    losses, terms = learn(make_distillation(weight=1.0, divergence="js"), labels_loss=jnp.full(6, jnp.inf))
    np.testing.assert_allclose(losses, divergence_by_formula("js", logits, answers, TEMPERATURE), rtol=1e-4)
    np.testing.assert_array_equal(losses, terms["distill_loss"])
    half, _ = learn(make_distillation(weight=0.5, divergence="js"), labels_loss=jnp.arange(6.0))
    np.testing.assert_allclose(half, (losses + np.arange(6)) / 2, rtol=1e-6)


@functools.cache
def frozen_on_one_device():
    return run_once(step_once(freeze_stats=True))


def run_once(made):
    """(how far the parameters moved, sums) of a step."""
    step, arguments = made
    start = jax.device_get(arguments[0].params)
    state, sums = jax.device_get(step(*arguments))
    return jax.tree.map(np.subtract, state.params, start), sums


@pytest.mark.parametrize(("parallel", "devices", "accumulate"), [("jit", 4, 2), ("pmap", 2, 2)])
def test_devices_and_micro_batches_take_the_same_step(parallel, devices, accumulate):
    made = step_once(freeze_stats=True, parallel=parallel, devices=devices, accumulate=accumulate)
    (want, want_sums), (got, sums) = frozen_on_one_device(), run_once(made)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), got, want)
    for name, (total, count) in want_sums.items():
        assert sums[name] == (pytest.approx(total, rel=1e-4), count)


# Whole runs.

DIGITS = [str(i) for i in range(10)]


def save_teacher(path: Path, *, seed: int = 0, names: list[str] = DIGITS, size: int = 20) -> Path:
    """Write weights of a small network for the classes of the digits, in another order."""
    model = create_model("mobilenet_v1", width=0.1, num_classes=len(names), shallow=True, stride_one=(0,))
    card = make_test_card(
        model.spec,
        name="wise",
        width=0.1,
        preprocessing=Preprocessing(TEACHER_MEAN, TEACHER_STD, image_size=size),
        class_names=names[::-1],
    )
    save_weights(path, model, init_variables(model, seed=seed), card)
    return path


def make_taught(teacher: Path | str, **values) -> Any:
    settings = {
        "model__shallow": True,
        "model__lowering": "plain",
        "data__mixup": 0.5,
        "train__steps": 6,
        "train__eval_every_epochs": 0.0,
        "train__save_every_epochs": 0.0,
        "train__distill__weights": str(teacher),
        "train__distill__temperature": 2.0,
        "train__distill__weight": 0.9,
    }
    return make_config(**settings | values)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_stopped_run_continues_to_the_bit_and_with_no_other_teacher(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher.safetensors")
    # The same weights in another place are the same teacher.
    same = Path(shutil.copy(teacher, tmp_path / "same.safetensors"))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_and_evaluate(make_taught(same), whole)
    lines = read_metrics(whole)
    assert all(line["train/distill_loss"] > 0 and 0 <= line["train/teacher_agreement"] <= 1 for line in lines)
    with monkeypatch.context() as patch:
        send_at(patch, 4, signal.SIGTERM)
        assert train_and_evaluate(make_taught(teacher), stopped)["step"] == 4
    other = save_teacher(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(RefusedError, match=r"another run: train\.distill\.sha256 was '\w{64}' and is '\w{64}'; "):
        train_and_evaluate(make_taught(other), stopped)
    with pytest.raises(RefusedError, match=r"train\.distill\.sha256 was '\w{64}' and is None"):
        train_and_evaluate(make_taught(""), stopped)
    train_and_evaluate(make_taught(same), stopped)
    assert_same_run(whole, stopped)
    # An evaluation needs no teacher.
    same.unlink()
    assert evaluate_run(make_taught(same), stopped)["step"] == 6
    with pytest.raises(RefusedError, match="there are no weights"):
        train_and_evaluate(make_taught(same), tmp_path / "third")


INFO = DataInfo(train_count=1437, eval_count=360, num_classes=10, class_names=tuple(DIGITS))
SPEC_OF_DIGITS = replace(SPEC, num_classes=10)


def test_classes_of_the_teacher_get_the_order_of_the_data(tmp_path):
    path = save_teacher(tmp_path / "t.safetensors")
    teacher = load_teacher(make_taught(path), SPEC_OF_DIGITS, INFO)
    assert teacher
    model = create_model("mobilenet_v1", width=0.1, num_classes=10, shallow=True, stride_one=(0,))
    kernel = init_variables(model, seed=0)["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(teacher.variables["params"]["classifier"]["kernel"], kernel[:, ::-1])
    assert teacher.distillation.image_size == 20
    own = load_teacher(make_taught(path, train__distill__prepare="student"), SPEC_OF_DIGITS, INFO)
    assert own
    assert (own.distillation.scale, own.distillation.shift) == ((1.0,) * 3, (0.0,) * 3)
    assert own.distillation.image_size == 16


@pytest.mark.parametrize(
    ("saved", "changes", "message"),
    [
        ({"names": ["a", *DIGITS[1:]]}, {}, r"cannot teach digits: the classes of .* differ: only one .* has 0, a$"),
        ({"names": DIGITS[1:]}, {}, r"cannot teach digits: digits has 10 classes and the weights 9"),
        ({}, {"model__num_classes": 12}, r"model\.num_classes is 12, and digits has 10 classes; valid with"),
        ({"size": 1}, {}, r"train\.distill\.prepare is 'teacher', which gives the teacher images of 1 px: "),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, saved, changes, message):
    config = make_taught(save_teacher(tmp_path / "t.safetensors", **saved), **changes)
    student = replace(SPEC, num_classes=config.model.num_classes or 10)
    with pytest.raises(ValueError, match=message):
        load_teacher(config, student, INFO)
