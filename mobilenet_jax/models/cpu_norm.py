"""Batch norm and its activation as one operation with its own gradient: the part of `cpu.py` for norms."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mobilenet_jax.models.activations import ACTIVATIONS
from mobilenet_jax.models.cpu import sum_pixels

# The gradient of each activation, given its input and the gradient of its output. It is JAX's own except for relu6 at
# 0 and 6, where JAX gives half the gradient at the price of a division at every pixel.
_SLOPES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "linear": lambda x, gradient: gradient,
    "relu": lambda x, gradient: jnp.where(x > 0, gradient, 0),
    "relu6": lambda x, gradient: jnp.where((x > 0) & (x < 6), gradient, 0),
    "hard_swish": lambda x, gradient: jnp.where(x > 3, 1, jnp.where(x > -3, x / 3 + 0.5, 0)) * gradient,
    "gelu": lambda x, gradient: jax.vjp(ACTIVATIONS["gelu"], x)[1](gradient)[0],
}


def _wide(channels):
    """Give [C] the rank of a map [B, H, W, C]."""
    return channels[None, None, None, :]


def _moments(x, add):
    """Return mean and variance [C] of float32 or wider; `add` sums maps to [C]."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[-1]
    mean = add(x) / count
    # E[x^2] - E[x]^2 reads the map once; rounding may take it below 0.
    return mean, jnp.maximum(add(lax.square(x)) / count - lax.square(mean), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@functools.partial(jax.jit, static_argnums=(3, 4))  # norms of equal shapes are traced once
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (activation of the normalised x [B, H, W, C], batch mean [C], batch variance [C]).

    Statistics are float32 or wider. No gradient flows through mean and variance.
    """
    one_pass = functools.partial(_one_pass_norm, epsilon=epsilon, activation=activation)
    plain = functools.partial(_plain_norm, epsilon=epsilon, activation=activation)
    return lax.platform_dependent(x, scale, bias, cpu=one_pass, default=plain)


def _one_pass_norm(x, scale, bias, *, epsilon, activation):
    mean, var = _moments(x, sum_pixels)
    factor = scale * lax.rsqrt(var + epsilon)
    y = x.astype(mean.dtype) * _wide(factor) + _wide(bias - mean * factor)
    return ACTIVATIONS[activation](y).astype(x.dtype), mean, var


def _plain_norm(x, scale, bias, *, epsilon, activation):
    mean, var = _moments(x, functools.partial(jnp.sum, axis=(0, 1, 2)))
    y = (x.astype(mean.dtype) - _wide(mean)) * _wide(scale * lax.rsqrt(var + epsilon)) + _wide(bias)
    return ACTIVATIONS[activation](y.astype(x.dtype)), mean, var


def _normalise_forward(x, scale, bias, epsilon, activation):
    y, mean, var = normalise(x, scale, bias, epsilon, activation)  # pyright: ignore[reportGeneralTypeIssues]
    return (y, mean, var), (x, scale, bias, mean, var)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalise_backward(epsilon, activation, residuals, gradients):
    one_pass = functools.partial(_one_pass_gradients, epsilon=epsilon, activation=activation)

    def plain(x, scale, bias, _mean, _var, gradient):
        # Nothing is computed twice: the compiler finds the forward pass in the program already.
        forward = functools.partial(_plain_norm, epsilon=epsilon, activation=activation)
        return jax.vjp(lambda *arrays: forward(*arrays)[0], x, scale, bias)[1](gradient)

    return lax.platform_dependent(*residuals, gradients[0], cpu=one_pass, default=plain)


def _one_pass_gradients(x, scale, bias, mean, var, gradient, *, epsilon, activation):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inverse = lax.rsqrt(var + epsilon)
    centred = (x.astype(dtype) - _wide(mean)) * _wide(inverse)
    # Recomputing the activation's input from x is cheaper than keeping it.
    gradient = _SLOPES[activation](centred * _wide(scale) + _wide(bias), gradient.astype(dtype))
    bias_gradient = sum_pixels(gradient)
    scale_gradient = sum_pixels(gradient * centred)
    count = x.size // x.shape[-1]
    through_moments = _wide(bias_gradient / count) + centred * _wide(scale_gradient / count)
    x_gradient = _wide(scale * inverse) * (gradient - through_moments)
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


normalise.defvjp(_normalise_forward, _normalise_backward)
