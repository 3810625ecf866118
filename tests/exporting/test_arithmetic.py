"""Gradients and roundings of the int8 arithmetic by itself; `test_integer.py` compares its values with LiteRT."""

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.exporting import arithmetic
from mobilenet_jax.exporting.arithmetic import Encoding

HALVES = Encoding(np.float32(0.5), np.int32(10))  # from -69 to 58.5


def test_zero_is_exact_in_every_range():
    make = jax.jit(arithmetic.make_encoding)
    for low, high in ((-1.0, 1.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0), (-1e-9, 0.0)):
        scale, zero = make(low, high)
        assert -128 <= int(zero) <= 127
        assert (-128 - int(zero)) * float(scale) <= min(low, 0) + float(scale) / 2
        assert (127 - int(zero)) * float(scale) >= max(high, 0) - float(scale) / 2


def test_gradients_stop_where_codes_saturate_and_not_at_the_bounds():
    levels = jnp.array([-200.0, -138.0, -0.4, 0.6, 117.0, 130.0])
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda x: arithmetic.saturate(x, HALVES))))(levels)
    assert value.tolist() == [-138, -138, 0, 1, 117, 117]
    assert gradient.tolist() == [0, 1, 1, 1, 1, 0]


def test_activations_bound_the_codes():
    levels = jnp.array([-3.0, 0.0, 11.6, 12.4, 50.0])
    saturate = jax.jit(arithmetic.saturate, static_argnames="activation")
    assert saturate(levels, HALVES, activation="relu").tolist() == [0, 0, 12, 12, 50]
    assert saturate(levels, HALVES, activation="relu6").tolist() == [0, 0, 12, 12, 12]


def test_every_weight_has_a_gradient_the_largest_too():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)

    def add_levels(kernel):
        levels, scales = arithmetic.quantize_kernel(kernel)
        return jnp.sum(levels), scales

    gradient, scales = jax.jit(jax.grad(add_levels, has_aux=True))(kernel)
    np.testing.assert_allclose(gradient, np.broadcast_to(1 / scales, kernel.shape), rtol=1e-6)


def test_filters_of_zeros_stay_zeros():
    kernel = jnp.zeros((1, 1, 2, 3)).at[0, 0, 0, 1].set(2.0)
    levels, scales = jax.jit(arithmetic.quantize_kernel)(kernel)
    assert levels.ravel().tolist() == [0, 127, 0, 0, 0, 0]
    assert float(scales[1]) == np.float32(2 / 127)
