import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from configs.base import get_config
from mobilenet_jax.training.optim import OPTIMIZERS, SCHEDULES, find_frozen, make_optimizer, make_schedule, match_rules

RATES = (0.1, 0.07, 0.2, 0.05)  # of four steps: a rate that changes tells where it is applied
PARAMS = {
    "stem": {
        "conv": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])},
        "norm": {"scale": jnp.array([1.0, 2.0])},
    },
    "classifier": {"kernel": jnp.array([0.3, -0.7]), "bias": jnp.array([0.1])},
}


def _config(**changes) -> Any:
    config: Any = get_config()
    config.optim.update(changes)
    return config.optim


def _schedule(step):
    return jnp.asarray(RATES)[step]


def _gradients(step):
    """Gradients of PARAMS that differ from step to step, by a factor of 1e4 within a tensor."""
    generator = np.random.default_rng(step)
    return jax.tree.map(
        lambda p: jnp.asarray(generator.normal(size=p.shape) * 10.0 ** generator.uniform(-3, 1, p.shape), p.dtype),
        PARAMS,
    )


def _make_optimizer(config, params, **options):
    frozen = find_frozen(config, params) if config.freeze else None
    return make_optimizer(config, params, frozen=frozen, **options)


def _run(config, *, steps, gradients=_gradients, params=PARAMS, schedule=_schedule, **options):
    """Parameters after some steps of the optimizer, jitted as in training."""
    optimizer = _make_optimizer(config, params, schedule=schedule, **options)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, gradients(t))
    return params, state


def _run_reference(make_update, *, steps, gradients=_gradients):
    """The same in double precision; `make_update()` gives (param, gradient, rate, step) -> new param."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
    updates = jax.tree.map(lambda _: make_update(), params)
    for t in range(steps):
        g = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients(t))
        params = jax.tree.map(lambda f, p, g, t=t: f(p, g, RATES[t], t), updates, params, g)
    return params


def _assert_close(got, want, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, want)


def test_trap_13_rmsprop_is_tensorflows():
    config = _config(name="rmsprop", rms_decay=0.9, momentum=0.8, epsilon=0.002)

    def make_update():
        square, velocity = 1.0, 0.0

        def update(p, g, rate, _):
            nonlocal square, velocity
            square = 0.9 * square + 0.1 * g * g
            velocity = 0.8 * velocity + rate * g / np.sqrt(square + 0.002)
            return p - velocity

        return update

    params, _ = _run(config, steps=3)
    _assert_close(params, _run_reference(make_update, steps=3))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(nesterov):
    config = _config(name="sgd", momentum=0.9, nesterov=nesterov)

    def make_update():
        velocity = 0.0

        def update(p, g, rate, _):
            nonlocal velocity
            velocity = 0.9 * velocity + g
            return p - rate * (g + 0.9 * velocity if nesterov else velocity)

        return update

    params, _ = _run(config, steps=4)
    _assert_close(params, _run_reference(make_update, steps=4))


def test_adamw_is_pytorchs():
    rules = ((".*", 1.0),)
    config = _config(name="adamw", beta1=0.6, beta2=0.99, epsilon=1e-6, weight_decay=0.1, decay_rules=rules)

    def make_update():
        mean, square = 0.0, 0.0

        def update(p, g, rate, t):
            nonlocal mean, square
            mean, square = 0.6 * mean + 0.4 * g, 0.99 * square + 0.01 * g * g
            p = p * (1 - rate * 0.1)
            return p - rate * (mean / (1 - 0.6 ** (t + 1))) / (np.sqrt(square / (1 - 0.99 ** (t + 1))) + 1e-6)

        return update

    params, _ = _run(config, steps=4)
    _assert_close(params, _run_reference(make_update, steps=4))


def test_trap_16_l2_is_the_gradient_of_half_the_sum_of_squares():
    config = _config(name="sgd", momentum=0.0, l2=0.01, decay_rules=((".*", 1.0),))
    loss = lambda params: sum(0.01 * jnp.sum(w**2) / 2 for w in jax.tree.leaves(params))  # noqa: E731
    zero = lambda _: jax.tree.map(jnp.zeros_like, PARAMS)  # noqa: E731
    params, _ = _run(config, steps=1, gradients=zero)
    _assert_close(params, jax.tree.map(lambda p, g: p - RATES[0] * g, PARAMS, jax.grad(loss)(PARAMS)))
    _assert_close(params, jax.tree.map(lambda p: p * (1 - RATES[0] * 0.01), PARAMS))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_l2_goes_through_the_optimizer_as_a_gradient(name):
    rules = ((".*", 1.0),)
    with_l2, _ = _run(_config(name=name, l2=0.3, decay_rules=rules), steps=1)
    added = lambda t: jax.tree.map(lambda g, p: g + 0.3 * p, _gradients(t), PARAMS)  # noqa: E731
    by_hand, _ = _run(_config(name=name, decay_rules=rules), steps=1, gradients=added)
    _assert_close(with_l2, by_hand)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_weight_decay_goes_past_momentum_and_scaling(name):
    """With no gradient at all only the product of (1 - rate * decay) is left."""
    config = _config(name=name, weight_decay=0.3, decay_rules=((".*", 1.0),))
    params, _ = _run(config, steps=3, gradients=lambda _: jax.tree.map(jnp.zeros_like, PARAMS))
    left = np.prod([1 - rate * 0.3 for rate in RATES[:3]])
    _assert_close(params, jax.tree.map(lambda p: p * left, PARAMS))


@pytest.mark.parametrize("kind", ["l2", "weight_decay"])
def test_decay_rules_scale_by_the_first_match(kind):
    rules = (("^stem/conv", 0.5), ("kernel$", 1.0), (".*", 0.0))
    config = _config(**{"name": "sgd", "momentum": 0.0, kind: 0.1, "decay_rules": rules})
    params, _ = _run(config, steps=1, gradients=lambda _: jax.tree.map(jnp.zeros_like, PARAMS))
    factors = {
        "stem": {"conv": {"kernel": 0.5}, "norm": {"scale": 0.0}},
        "classifier": {"kernel": 1.0, "bias": 0.0},
    }
    _assert_close(params, jax.tree.map(lambda p, factor: p * (1 - RATES[0] * 0.1 * factor), PARAMS, factors))


def test_clipping_sees_the_global_norm_of_the_raw_gradients():
    big = jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS)
    config = _config(name="sgd", momentum=0.0, clip_norm=2.0, l2=0.1, decay_rules=((".*", 1.0),))
    params, _ = _run(config, steps=1, gradients=lambda _: big)
    elements = sum(p.size for p in jax.tree.leaves(PARAMS))
    clipped = 2.0 / np.sqrt(elements)
    _assert_close(params, jax.tree.map(lambda p: p - RATES[0] * (clipped + 0.1 * p), PARAMS))
    small = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)
    params, _ = _run(_config(name="sgd", momentum=0.0, clip_norm=2.0), steps=1, gradients=lambda _: small)
    _assert_close(params, jax.tree.map(lambda p: p - RATES[0] * 0.1, PARAMS))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_frozen_parameters_stay_to_the_bit_and_have_no_state(name):
    rules = (("kernel$", 1.0), (".*", 0.5))
    config = _config(name=name, freeze=("^stem/",), l2=0.1, weight_decay=0.1, clip_norm=1.0, decay_rules=rules)
    frozen, state = _run(config, steps=3)
    jax.tree.map(np.testing.assert_array_equal, frozen["stem"], PARAMS["stem"])
    # The others move as if they were alone: the frozen ones' gradients are not in the norm either.
    config.freeze = ()
    head = {"classifier": PARAMS["classifier"]}
    gradients = lambda t: {"classifier": _gradients(t)["classifier"]}  # noqa: E731
    alone, alone_state = _run(config, steps=3, gradients=gradients, params=head)
    jax.tree.map(np.testing.assert_array_equal, frozen["classifier"], alone["classifier"])
    shapes, alone_shapes = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (state, alone_state))
    assert shapes == alone_shapes


def test_frozen_parameters_survive_gradients_that_are_not_finite():
    bad = {**_gradients(0), "stem": jax.tree.map(lambda p: p * jnp.nan, PARAMS["stem"])}
    params, _ = _run(_config(freeze=("^stem/",), clip_norm=1.0), steps=1, gradients=lambda _: bad)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_what_thaws_stays_to_the_bit_until_then_and_begins_as_a_new_optimizer_does(name):
    """Not as one that saw gradients of 0: Adam's and RMSProp's first updates would be three times too large."""
    rules = (("kernel$", 1.0), (".*", 0.5))
    strengths: dict = {"name": name, "l2": 0.1, "weight_decay": 0.1, "decay_rules": rules}
    config = _config(**strengths, freeze=("^stem/",), freeze_epochs=1.0)

    def gradients(t):  # as `train_step` gives them
        stem = jax.tree.map(lambda g: g * (t >= 2), _gradients(t)["stem"])
        return {**_gradients(t), "stem": stem}

    frozen, _ = _run(config, steps=2, gradients=gradients, freeze_steps=2)
    jax.tree.map(np.testing.assert_array_equal, frozen["stem"], PARAMS["stem"])
    thawed, _ = _run(config, steps=4, gradients=gradients, freeze_steps=2)
    stem, _ = _run(
        _config(**strengths),
        steps=2,
        params={"stem": PARAMS["stem"]},
        gradients=lambda t: {"stem": _gradients(t + 2)["stem"]},
        schedule=lambda step: _schedule(step + 2),
    )
    _assert_close(thawed["stem"], stem["stem"], rtol=1e-6)
    head, _ = _run(
        _config(**strengths),
        steps=4,
        params={"classifier": PARAMS["classifier"]},
        gradients=lambda t: {"classifier": _gradients(t)["classifier"]},
    )
    _assert_close(thawed["classifier"], head["classifier"], rtol=1e-6)


def test_what_thawed_is_clipped_by_the_norm_of_all():
    config = _config(name="sgd", momentum=0.0, clip_norm=2.0, freeze=("^stem/",), freeze_epochs=0.0)
    big = jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS)
    params, _ = _run(config, steps=1, gradients=lambda _: big, freeze_steps=0)
    clipped = 2.0 / np.sqrt(sum(p.size for p in jax.tree.leaves(PARAMS)))
    _assert_close(params, jax.tree.map(lambda p: p - RATES[0] * clipped, PARAMS))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("freeze", [(), ("bias$",)])
def test_layer_decay_scales_the_rate_by_its_power_of_the_layers_above(name, freeze):
    strengths: dict = {"name": name, "l2": 0.1, "weight_decay": 0.1, "freeze": freeze}
    params, _ = _run(_config(**strengths, layer_decay=0.5), steps=1, layers=("stem", "block_00", "classifier"))
    whole, _ = _run(_config(**strengths), steps=1)
    moved = jax.tree.map(np.subtract, params, PARAMS)
    want = jax.tree.map(np.subtract, whole, PARAMS)
    _assert_close(moved["classifier"], want["classifier"])
    _assert_close(moved["stem"], jax.tree.map(lambda m: 0.25 * m, want["stem"]))


def test_frozen_parameters_are_told_by_their_patterns():
    frozen = find_frozen(_config(freeze=("^(?!classifier/)", "bias$")), PARAMS)
    assert frozen == {
        "stem": {"conv": {"kernel": True}, "norm": {"scale": True}},
        "classifier": {"kernel": False, "bias": True},
    }


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_structure_of_the_state_does_not_depend_on_strengths(name):
    """A run may be resumed with another decay, clipping or momentum."""
    plain = _config(name=name, momentum=0.0)
    full = _config(name=name, l2=0.1, weight_decay=0.1, clip_norm=1.0, momentum=0.9, nesterov=True)
    plain, full = (_make_optimizer(c, PARAMS, schedule=_schedule).init(PARAMS) for c in (plain, full))
    assert jax.tree.structure(plain) == jax.tree.structure(full)


def test_optimizer_state_goes_through_orbax(tmp_path):
    config = _config(name="rmsprop", freeze=("bias$",), l2=0.1, weight_decay=0.1, clip_norm=1.0)
    _, state = _run(config, steps=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        fresh = _make_optimizer(config, PARAMS, schedule=_schedule).init(PARAMS)
        restored = checkpointer.restore(tmp_path / "state", fresh)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_rules_give_the_first_match_and_log_what_each_took(caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        tree = match_rules(PARAMS, (("norm/", "norm"), ("kernel$", "weight"), (".*", "rest")), key="a.key")
    assert tree == {
        "stem": {"conv": {"kernel": "weight"}, "norm": {"scale": "norm"}},
        "classifier": {"kernel": "weight", "bias": "rest"},
    }
    assert [record.getMessage() for record in caplog.records] == [
        "a.key: 'norm/': norm for 1 parameters, 2 elements",
        "a.key: 'kernel$': weight for 2 parameters, 6 elements",
        "a.key: '.*': rest for 1 parameters, 1 elements",
    ]


def test_catch_all_may_match_nothing():
    assert match_rules({"w": jnp.ones(1)}, (("w", 1), (".*", 0)), key="a.key") == {"w": 1}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("kernle$", 1), (".*", 0)), r"a\.key: 'kernle\$' matches no parameter"),
        (((".", 1), ("kernel$", 0)), r"'kernel\$' matches no parameter that the patterns before it leave"),
        ((("kernel$", 1),), r"no rule matches 'classifier/bias'"),
        ((("(kernel", 1),), r"'\(kernel' is no regular expression"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        match_rules(PARAMS, rules, key="a.key")


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match=r"optim\.freeze .* no parameter to train"):
        find_frozen(_config(freeze=(".",)), PARAMS)


SPE, BATCH, TOTAL = 22.453125, 64, 900  # the digits: 1,437 / 64 steps an epoch


def _rates(config, *, total=TOTAL, spe=SPE):
    schedule = make_schedule(config, batch_size=BATCH, steps_per_epoch=spe, total_steps=total)
    return np.asarray(jax.vmap(schedule)(jnp.arange(total + 1)))


@pytest.mark.parametrize("warmup_epochs", [0.0, 2.5])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_are_their_formulas(name, warmup_epochs):
    config = _config(schedule=name, lr_per_256=0.4, warmup_epochs=warmup_epochs, decay_factor=0.9, decay_epochs=2.4)
    peak, warmup = 0.4 * BATCH / 256, warmup_epochs * SPE
    t = np.arange(TOTAL + 1, dtype=np.float64)
    after = {
        "cosine": lambda t: peak / 2 * (1 + np.cos(np.pi * np.maximum(t - warmup, 0) / (TOTAL - warmup))),
        "staircase": lambda t: peak * 0.9 ** np.floor(t / (2.4 * SPE)),
        "constant": lambda t: peak + 0 * t,
    }[name]
    want = np.where(t < warmup, t / max(warmup, 1) * after(np.float64(warmup)), after(t))
    np.testing.assert_allclose(_rates(config), want, rtol=1e-4, atol=1e-8)


def test_cosine_ends_at_zero_and_rises_to_the_peak():
    rates = _rates(_config(schedule="cosine", lr_per_256=0.4, warmup_epochs=2.0), spe=50)
    assert rates[0] == 0
    assert rates.argmax() == 100
    assert rates[100] == pytest.approx(0.4 * BATCH / 256)
    assert rates[TOTAL] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(("batch_size", "rate"), [(64, 0.025), (256, 0.1), (4096, 1.6)])
def test_rate_follows_the_batch_size(batch_size, rate):
    config = _config(schedule="constant", lr_per_256=0.1)
    schedule = make_schedule(config, batch_size=batch_size, steps_per_epoch=1, total_steps=1)
    assert schedule(0) == pytest.approx(rate)


def test_trap_14_rate_of_one_percent_every_three_epochs_is_a_factor_of_099():
    config = _config(schedule="staircase", lr_per_256=1.0, decay_factor=0.99, decay_epochs=3.0)
    rates = _rates(config, spe=10, total=3000) / (BATCH / 256)
    assert rates[29] == 1
    assert rates[30] == pytest.approx(0.99)
    assert rates[3000] == pytest.approx(0.99**100, rel=1e-4)  # 300 epochs: a third is left, not 1e-200


def test_trap_15_stairs_are_counted_from_the_first_step():
    """Warm-up of 5 epochs, stairs every 3: the first stair behind the warm-up falls at epoch 6, not 8."""
    config = _config(schedule="staircase", lr_per_256=1.0, decay_factor=0.5, decay_epochs=3.0, warmup_epochs=5.0)
    rates = _rates(config, spe=10, total=120) / (BATCH / 256)
    np.testing.assert_allclose(rates[[50, 59, 60, 89, 90]], [0.5, 0.5, 0.25, 0.25, 0.125])
    # The warm-up goes straight to what the stairs have at its end.
    np.testing.assert_allclose(rates[:51], np.arange(51) / 50 * 0.5, rtol=1e-5)


def test_warm_up_longer_than_the_run_is_reported_and_runs(caplog):
    config = _config(schedule="cosine", lr_per_256=1.0, warmup_epochs=5.0)
    with caplog.at_level(logging.WARNING, logger="absl"):
        rates = _rates(config, spe=1000, total=3) / (BATCH / 256)
    assert "outlasts" in caplog.text
    np.testing.assert_allclose(rates, np.arange(4) / 5000, rtol=1e-5)
