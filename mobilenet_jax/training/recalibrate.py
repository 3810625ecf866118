"""Batch-norm statistics measured over many images with fixed parameters, to replace running statistics.

Running statistics lag behind the parameters by 1 / (1 - bn_decay) steps and weigh the last batches most. Measured
statistics do neither (2105.07576, sec. 3).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.training.sharding import put_batch, shard_eval_step


def make_stats_step(model: MobileNet, mesh: Mesh, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """Return a jitted function (variables, batch) -> `batch_stats` of this batch, with no layer dropped."""
    spec = replace(model.spec, num_classes=0, bn_decay=0.0, drop_path=0.0)
    model = model.clone(spec=spec, freeze_stats=False)

    def step(variables: dict, batch: dict[str, jax.Array]):
        images = normalise_images(batch["images"], mean, std)
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return shard_eval_step(step, mesh)


def measure_stats(
    step: Callable, kinds: Sequence[dict], batches: Iterable[dict[str, np.ndarray]], *, mesh: Mesh
) -> list[Any]:
    """Return, for each set of variables, the `batch_stats` of all images of the batches together.

    `step` is a function from `make_stats_step`; the batches are of equal size. The variance adds the variance within
    the batches and the variance of their means. Sums are float64.
    """
    totals: Any = None
    pending: Any = None
    count = 0
    for batch in batches:
        # As in evaluation, the statistics of a batch are read when the next one is on its way.
        placed = put_batch(batch, mesh)
        running = [step(variables, placed) for variables in kinds]
        totals = _add(totals, pending)
        pending, count = running, count + 1
    means = jax.tree.map(lambda total: total / count, _add(totals, pending))
    return [jax.tree.map(jnp.float32, _map_norms(_to_stats, mean)) for mean in means]


def _add(totals: Any, pending: Any) -> Any:
    """Return the float64 sums of moments with those of a batch, which is fetched at once; None stands for nothing."""
    if pending is None:
        return totals
    moments = _map_norms(_to_moments, jax.tree.map(np.float64, jax.device_get(pending)))
    return moments if totals is None else jax.tree.map(np.add, totals, moments)


def _to_moments(norm: dict) -> dict:
    return {"mean": norm["mean"], "var": norm["var"] + norm["mean"] ** 2}


def _to_stats(norm: dict) -> dict:
    return {"mean": norm["mean"], "var": np.maximum(norm["var"] - norm["mean"] ** 2, 0)}


def _map_norms(change: Callable[[dict], dict], stats: Any) -> Any:
    return jax.tree.map(change, stats, is_leaf=lambda node: isinstance(node, dict) and "var" in node)
