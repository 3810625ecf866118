import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.training.ema import update_ema


def _reference(values: list[float], *, initial: float, decay: float) -> float:
    """The same in double precision, as the formula is written."""
    average = initial
    for t, value in enumerate(values):
        kept = min(decay, (1 + t) / (10 + t))
        average = kept * average + (1 - kept) * value
    return average


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0])
def test_trap_18_ema_covers_statistics_ramps_and_starts_from_the_initial_values(decay):
    values = np.random.default_rng(0).normal(size=30)
    ema = {"params": {"kernel": jnp.full(3, 2.0)}, "batch_stats": {"var": jnp.float32(1.0)}}
    update = jax.jit(update_ema, static_argnames="decay")
    for t, value in enumerate(values):
        new = {"params": {"kernel": jnp.full(3, value)}, "batch_stats": {"var": jnp.float32(1 + value)}}
        ema = update(ema, new, step=t, decay=decay)
    want = _reference(list(values), initial=2.0, decay=decay)
    np.testing.assert_allclose(ema["params"]["kernel"], np.full(3, want), rtol=1e-5)
    want = _reference(list(1 + values), initial=1.0, decay=decay)
    np.testing.assert_allclose(ema["batch_stats"]["var"], want, rtol=1e-5)


def test_first_update_keeps_a_tenth_of_the_initial_value():
    assert update_ema(jnp.float32(1.0), jnp.float32(0.0), step=0, decay=0.9999) == pytest.approx(0.1)


def test_constant_stays_constant_to_the_last_bit():
    value = jnp.float32(0.1)
    ema = value
    for t in range(100):
        ema = update_ema(ema, value, step=t, decay=0.999)
    assert ema == value
