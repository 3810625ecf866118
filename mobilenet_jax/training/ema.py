"""Exponential moving average of parameters and batch-norm statistics."""

import jax
import jax.numpy as jnp


def update_ema(ema, new, *, step: jax.Array | int, decay: float):
    """Move the average one step towards `new`, with TensorFlow's ramp of the decay.

    The share kept is min(decay, (1 + t) / (10 + t)), as in `tf.train.ExponentialMovingAverage` with num_updates. The
    first update keeps 1/10, so that the initial values are soon forgotten.

    Args:
      ema: tree of float arrays; before the first update, the initial values themselves. It must hold the statistics as
        well as the parameters: averaged parameters lose accuracy with statistics that are not averaged.
      new: tree of the same structure, after the step.
      step: t, the number of updates made before this one: 0 at the first.
      decay: the largest share kept, in [0, 1).

    Returns:
      The new average, a tree of the same structure.
    """
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    # In this form, an average that equals the new value stays equal to it to the last bit.
    return jax.tree.map(lambda old, value: old + (1 - kept) * (value - old), ema, new)
