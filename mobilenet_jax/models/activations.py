"""Activations and gates by name."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
# The hard sigmoid is relu6(x + 3) / 6, not the 0.2 x + 0.5 of older Keras.
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "hard_sigmoid": nn.hard_sigmoid,
    "sigmoid": nn.sigmoid,
    "hard_swish": nn.hard_swish,
}
