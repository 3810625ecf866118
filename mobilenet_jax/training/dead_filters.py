"""Dead filters: how many there are, while a network trains."""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.spec import Spec

# A filter is dead if its norm is below this share of the norm of a usual filter of its layer. The response of such a
# channel is below one step of the int8 scale of the others (1/127 of the largest weight), and adds 1e-4 of the power of
# a usual channel.
DEAD = 1e-2
# A filter below this share of the largest norm does not count when the usual norm is found. Weight decay takes a filter
# without gradient to 1e-10 and less, and no two living filters were seen that differ a million times.
_NEGLIGIBLE = 1e-6


def relative_norms(kernel: Any, factor: Any, *, xp: ModuleType = np) -> Any:
    """Return [C]: the norm of each filter of a kernel [..., C] times `factor` [C], over the norm of a usual filter.

    `factor` folds the batch norm in: scale / sqrt(variance + epsilon). A scale of 0 kills a filter as weights of 0 do,
    and a filter with small weights that batch norm scales up is alive. The usual norm is the median of the norms above
    1e-6 of the largest. It is right even if most filters of a layer are dead, or if a few are 1000 times the others.
    All relative norms are 0 in a layer of zeros. `xp` is NumPy, or jax.numpy under `jit`.
    """
    norms = xp.sqrt(xp.sum(xp.square(kernel), axis=tuple(range(kernel.ndim - 1)))) * xp.abs(factor)
    largest = xp.max(norms)
    count = xp.sum(norms >= _NEGLIGIBLE * largest)
    usual = xp.sort(norms)[norms.size - count + count // 2]
    return norms / xp.where(usual > 0, usual, 1)


@functools.partial(jax.jit, static_argnums=0)
def count_dead_filters(spec: Spec, params: Any, batch_stats: Any) -> dict[str, tuple[Any, Any]]:
    """Return counts as pairs (count, 1), for the metrics of a training run.

    `dead_filters` counts the dead filters of all depthwise layers, `filters_below_1e-4` to `filters_below_1e-1` those
    whose relative norm is below that number, and `variances_below_epsilon` the running variances of all batch norms
    that are smaller than epsilon.
    """
    below = dict.fromkeys(("1e-4", "1e-3", "1e-2", "1e-1"), jnp.zeros(()))
    dead = variances = jnp.zeros(())
    for layer in list_layers(spec, {"params": params, "batch_stats": batch_stats}):
        if layer.variance is not None:
            variances += jnp.sum(layer.variance < spec.bn_epsilon)
        if layer.kind == "depthwise":
            relative = relative_norms(layer.kernel, layer.factor, xp=jnp)
            dead += jnp.sum(relative < DEAD)
            below = {limit: count + jnp.sum(relative < float(limit)) for limit, count in below.items()}
    counts = {"dead_filters": dead, **{f"filters_below_{k}": v for k, v in below.items()}}
    return {name: (value, jnp.ones(())) for name, value in (counts | {"variances_below_epsilon": variances}).items()}
