"""Dead filters: how many there are, while a network trains."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.spec import Spec

# Of a filter's norm over that of a usual one of its layer. A channel whose response is a hundredth of the others' is
# below one step of their int8 scale (1/127 of the largest weight), and adds 1e-4 of a usual channel's power.
DEAD = 1e-2
# Of the largest norm: what is below is no example of a usual filter. Weight decay takes a filter without gradient to
# 1e-10 and less in a training run, and no living ones were seen a million times apart.
_NEGLIGIBLE = 1e-6


def relative_norms(kernel: Any, factor: Any, *, xp: ModuleType = np) -> Any:
    """Norm of each filter of a kernel [..., C] times its `factor` [C], over that of a usual filter of the layer: [C].

    With the batch norm folded in, `factor` is scale / sqrt(variance + epsilon): a filter is as dead by a scale of 0 as
    by weights of 0, and one with small weights that batch norm scales up is alive. The usual norm is the median of
    those above 1e-6 of the largest: it stands where most filters of a layer are gone, and where a few are 1000 times
    the rest.
    All are 0 in a layer of zeros. `xp` is NumPy, or jax.numpy under `jit`.
    """
    norms = xp.sqrt(xp.sum(xp.square(kernel), axis=tuple(range(kernel.ndim - 1)))) * xp.abs(factor)
    largest = xp.max(norms)
    count = xp.sum(norms >= _NEGLIGIBLE * largest)
    usual = xp.sort(norms)[norms.size - count + count // 2]
    return norms / xp.where(usual > 0, usual, 1)


def count_dead_filters(spec: Spec, params: Any, batch_stats: Any) -> dict[str, tuple[Any, Any]]:
    """Counts over all depthwise layers as (count, 1), for a training run's metrics; runs under `jit`.

    `dead_filters`; `filters_below_1e-4` to `_1e-1` of a usual filter of the layer, a histogram in decades; and
    `variances_below_epsilon` of all batch norms.
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
