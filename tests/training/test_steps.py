import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec
from mobilenet_jax.training.losses import mix_batch
from mobilenet_jax.training.steps import StepOptions, TrainState, create_state, eval_step, train_step

CLASSES, SIZE, DECAY = 5, 16, 0.8
SPEC = Spec(
    name="tiny",
    stem=Conv(filters=8, stride=2),
    blocks=(InvertedResidual(expanded=16, filters=8),),
    head=None,
    num_classes=CLASSES,
    padding="same",
    bn_epsilon=1e-3,
    bn_decay=DECAY,
    dropout=0.0,
)
MEAN, STD = (120.0, 130.0, 140.0), (60.0, 50.0, 40.0)
KEY = jax.random.key(7)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1, 2], np.int32)
BATCH = {"images": jnp.asarray(IMAGES), "labels": jnp.asarray(LABELS)}
INPUTS = (IMAGES.astype(np.float64) - MEAN) / STD


@functools.cache
def make_variables() -> dict:
    return init_variables(MobileNet(SPEC), seed=0)


def run(
    steps: int,
    *,
    spec: Spec = SPEC,
    optimizer: optax.GradientTransformation | None = None,
    ema: bool = False,
    freeze_stats: bool = False,
    dtype: str = "float32",
    state: TrainState | None = None,
    batch: dict[str, jax.Array] = BATCH,
    **options: Any,
) -> list[tuple[TrainState, dict[str, tuple]]]:
    """The state and the sums after each of `steps` steps on the same batch."""
    optimizer = optimizer or optax.sgd(0.1)
    step = functools.partial(
        train_step,
        model=MobileNet(spec, dtype=dtype, freeze_stats=freeze_stats),
        optimizer=optimizer,
        options=StepOptions(**{"mean": MEAN, "std": STD, **options}),
    )
    step, seen = jax.jit(step), []
    state = state or create_state(make_variables(), optimizer, ema=ema)
    for _ in range(steps):
        state, sums = step(state, batch, KEY)
        seen.append((state, sums))
    return seen


def apply_in_training(inputs) -> np.ndarray:
    """Logits in double precision of normalised images, by the statistics of their batch."""
    inputs = jnp.asarray(inputs, jnp.float32)
    logits, _ = MobileNet(SPEC).apply(make_variables(), inputs, train=True, mutable=["batch_stats"])
    return np.asarray(logits, np.float64)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over the batch, written as the definition."""
    return -(targets * (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))).sum()


def stem_maps(inputs: np.ndarray) -> np.ndarray:
    """What the first batch norm sees, in double precision of the values."""
    kernel = jnp.asarray(make_variables()["params"]["stem"]["conv"]["kernel"])
    maps = lax.conv_general_dilated(
        jnp.asarray(inputs, jnp.float32), kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(maps, np.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trap_12_loss_of_the_step_is_the_smoothed_formula(smoothing):
    ((_, sums),) = run(1, label_smoothing=smoothing)
    targets = (1 - smoothing) * np.eye(CLASSES)[LABELS] + smoothing / CLASSES
    logits = apply_in_training(INPUTS)
    assert sums["loss"][0] == pytest.approx(cross_entropy(logits, targets), rel=1e-5)
    assert sums["loss"][1] == sums["top1"][1] == len(LABELS)
    assert sums["top1"][0] == (logits.argmax(-1) == LABELS).sum()


def test_mixed_images_meet_the_targets_mixed_alike():
    mix: dict[str, Any] = {"mixup": 0.8, "cutmix": 1.0}
    ((_, sums),) = run(1, label_smoothing=0.1, **mix)
    mix_key, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    onehot = jax.nn.one_hot(LABELS, CLASSES)
    inputs = jnp.asarray(INPUTS, jnp.float32)
    images, targets = mix_batch(mix_key, inputs, onehot, probability=1.0, **mix)
    assert not np.allclose(targets, onehot)
    want = cross_entropy(apply_in_training(images), 0.9 * np.asarray(targets) + 0.1 / CLASSES)
    assert sums["loss"][0] == pytest.approx(want, rel=1e-5)


def test_trap_24_training_and_evaluation_normalise_alike_by_mean_and_std():
    np.testing.assert_allclose(normalise_images(BATCH["images"], MEAN, STD), INPUTS, rtol=1e-6, atol=1e-6)
    # With the statistics frozen and no dropout, the same images cost the same in both.
    ((_, trained),) = run(1, freeze_stats=True)
    batch = {**BATCH, "mask": jnp.ones(len(LABELS), bool)}
    evaluate = functools.partial(eval_step, make_variables(), batch, model=MobileNet(SPEC))
    loss = evaluate(mean=MEAN, std=STD)["loss"]
    assert loss == pytest.approx(float(trained["loss"][0]), rel=1e-5)
    assert evaluate(mean=(127.5,) * 3, std=(127.5,) * 3)["loss"] != pytest.approx(float(loss), rel=1e-3)


def test_trap_19_momentum_is_the_share_of_the_statistics_that_is_kept():
    ((state, _),) = run(1)
    maps = stem_maps(INPUTS)
    mean, var = maps.mean((0, 1, 2)), maps.var((0, 1, 2))
    running = state.batch_stats["stem"]["norm"]
    np.testing.assert_allclose(running["mean"], DECAY * 0 + (1 - DECAY) * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running["var"], DECAY * 1 + (1 - DECAY) * var, rtol=1e-5)


def test_micro_batches_update_the_statistics_one_after_the_other():
    ((state, sums),) = run(1, accumulate=2)
    mean = np.zeros(SPEC.stem.filters)
    for part in (INPUTS[0::2], INPUTS[1::2]):
        mean = DECAY * mean + (1 - DECAY) * stem_maps(part).mean((0, 1, 2))
    np.testing.assert_allclose(state.batch_stats["stem"]["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)
    assert sums["loss"][1] == len(LABELS)


def test_frozen_statistics_stay_to_the_last_bit():
    for state, _ in run(2, freeze_stats=True):
        jax.tree.map(np.testing.assert_array_equal, state.batch_stats, make_variables()["batch_stats"])


def test_trap_21_statistics_and_loss_are_float32_and_finite_in_bfloat16():
    # Inputs up to about 500, whose squares float16 cannot hold.
    scale: dict[str, Any] = {"mean": (0.0,) * 3, "std": (0.5,) * 3}
    seen = run(4, dtype="bfloat16", **scale)
    for state, sums in seen:
        for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state, sums)):
            assert leaf.dtype == jnp.float32
            assert jnp.isfinite(leaf).all()
    ((wide, sums),) = run(1, **scale)
    # bfloat16 has 8 bits: each of the 5 layers rounds by up to 2^-9.
    assert seen[0][1]["loss"][0] == pytest.approx(float(sums["loss"][0]), rel=0.02)
    for name in ("mean", "var"):
        got, want = (state.batch_stats["stem"]["norm"][name] for state in (seen[0][0], wide))
        np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01 * np.abs(want).max())


def test_trap_29_randomness_is_of_key_and_step_and_replays_after_a_resume():
    # Learning rate 0: whatever differs between steps is dropout.
    fixed: dict[str, Any] = {
        "spec": replace(SPEC, dropout=0.5),
        "optimizer": optax.sgd(0.0),
        "freeze_stats": True,
    }
    seen = run(4, **fixed)
    losses = [float(sums["loss"][0]) for _, sums in seen]
    assert len(set(losses)) == 4
    saved = jax.tree.map(np.array, seen[1][0])
    resumed = run(2, state=jax.tree.map(jnp.array, saved), **fixed)
    assert [float(sums["loss"][0]) for _, sums in resumed] == losses[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed[-1][0], seen[-1][0])


def test_trap_18_ema_of_the_step_covers_parameters_and_statistics():
    decay, average = 0.15, {name: make_variables()[name] for name in ("params", "batch_stats")}
    for t, (state, _) in enumerate(run(3, ema=True, ema_decay=decay)):
        kept = min(decay, (1 + t) / (10 + t))
        new = {"params": state.params, "batch_stats": state.batch_stats}
        average = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, average, new)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.ema, average)
    assert run(1)[0][0].ema is None


def test_gradient_norm_is_reported_before_clipping():
    def moved(state: TrainState) -> float:
        return float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, make_variables()["params"])))

    ((free, sums),) = run(1, optimizer=optax.sgd(1.0))
    norm = float(sums["grad_norm"][0])
    assert moved(free) == pytest.approx(norm, rel=1e-4)
    clip = norm / 3
    ((clipped, sums),) = run(1, optimizer=optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0)))
    assert moved(clipped) == pytest.approx(clip, rel=1e-4)
    assert sums["grad_norm"][0] == pytest.approx(norm, rel=1e-5)


def test_a_batch_of_eight_is_learned_by_heart_and_evaluates_so():
    seen = run(60, optimizer=optax.sgd(0.1, 0.9))
    state, sums = seen[-1]
    assert int(state.step) == 60
    assert sums["top1"][0] == len(LABELS)
    assert sums["loss"][0] < 0.1 * seen[0][1]["loss"][0]
    # The running statistics, 0.8^60 of the initial ones left, say the same.
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batch = {**BATCH, "mask": jnp.ones(len(LABELS), bool)}
    assert eval_step(variables, batch, model=MobileNet(SPEC), mean=MEAN, std=STD)["top1"] == len(LABELS)


FROZEN = {
    name: jax.tree.map(lambda _, n=name: n != "classifier", part) for name, part in make_variables()["params"].items()
}


def test_frozen_parameters_have_a_gradient_of_zero_and_no_part_in_the_norm():
    free, frozen = (run(1, freeze_stats=True, frozen=frozen)[0] for frozen in (None, FROZEN))
    start = make_variables()["params"]
    for name, part in frozen[0].params.items():
        # The others move as they do when nothing is frozen.
        same = free[0].params if name == "classifier" else start
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), part, same[name])
    gradient = jax.tree.map(lambda a, b: (a - b) / 0.1, start["classifier"], free[0].params["classifier"])
    assert float(frozen[1]["grad_norm"][0]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)
    assert float(frozen[1]["grad_norm"][0]) < float(free[1]["grad_norm"][0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_network_has_no_backward_pass(accumulate):
    def count_operations(**options) -> float:
        optimizer = optax.sgd(0.1)
        options = StepOptions(mean=MEAN, std=STD, accumulate=accumulate, **options)
        model = MobileNet(SPEC, freeze_stats=True)
        step = functools.partial(train_step, model=model, optimizer=optimizer, options=options)
        state = create_state(make_variables(), optimizer, ema=False)
        analysis: Any = jax.jit(step).lower(state, BATCH, KEY).compile().cost_analysis()
        return analysis["flops"]

    assert count_operations(frozen=FROZEN) < 0.5 * count_operations()
