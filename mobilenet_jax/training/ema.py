"""Exponential moving average of a model's parameters and batch-norm statistics."""

import jax
import jax.numpy as jnp


def update_ema(ema, new, *, step: jax.Array | int, decay: float):
    """Moves the average a step towards `new`, with TensorFlow's ramp of the decay.

    The share kept is min(decay, (1 + t) / (10 + t)), as in `tf.train.ExponentialMovingAverage` with
    num_updates: the first update keeps 1/10, so that the initial values are soon forgotten.

    Args:
      ema: tree of float arrays; to begin with, the initial values themselves. Statistics belong in it as well
        as parameters: averaged weights lose accuracy under the statistics of the others.
      new: tree of the same structure, after the step.
      step: t, the number of updates made before this one: 0 at the first.
      decay: the largest share kept, in [0, 1).

    Returns:
      The new average, a tree of the same structure.

    Raises:
      ValueError: the decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema.decay is {decay}; valid is a share from 0 up to, not including, 1")
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # In this form an average equal to the new value stays equal to it to the last bit.
    return jax.tree.map(lambda old, value: old + (1 - kept) * (value - old), ema, new)
