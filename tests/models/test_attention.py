import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.models.attention import attend


def _normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def _inputs():
    """Return queries of 3 heads of 4 channels on 5x3 pixels, and keys and values on 2x2 pixels."""
    return _normal(2, 5, 3, 12, seed=0), _normal(2, 2, 2, 4, seed=1), _normal(2, 2, 2, 6, seed=2)


def test_each_head_attends_with_the_shared_key_and_value():
    query, key, value = _inputs()
    with jax.enable_x64(True):
        found = attend(*(jnp.array(x) for x in (query, key, value)), heads=3)
    assert found.shape == (2, 5, 3, 18)
    for image, row, column, head in np.ndindex(2, 5, 3, 3):
        q = query[image, row, column, 4 * head : 4 * head + 4]
        weights = np.exp([q @ key[image, i, j] / 2 for i in range(2) for j in range(2)])  # 2 = sqrt(4)
        expected = weights / weights.sum() @ value[image].reshape(4, 6)
        np.testing.assert_allclose(found[image, row, column, 6 * head : 6 * head + 6], expected, rtol=1e-12)


def test_a_constant_added_to_all_keys_changes_nothing():
    query, key, value = (jnp.array(x, jnp.float32) for x in _inputs())
    shift = jnp.arange(4.0)[None, None, None]
    np.testing.assert_allclose(
        attend(query, key + shift, value, heads=3), attend(query, key, value, heads=3), atol=1e-5
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_trap_21_bfloat16_scores_are_float32(scale):
    """Scores in the hundreds do not overflow, and keep the differences that decide the shares."""
    inputs = [jnp.array(x, jnp.bfloat16) for x in _inputs()]
    query, key, value = inputs[0] * scale, inputs[1], inputs[2]
    found = attend(query, key, value, heads=3)
    assert found.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)), heads=3)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02)  # 8 bits of mantissa of values up to 3
