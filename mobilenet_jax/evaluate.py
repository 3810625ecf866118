"""Exact evaluation: every image counted once, whatever the batch size, the devices or the hosts."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from mobilenet_jax.sharding import put_batch


def evaluate(
    step: Callable, variables: dict, batches: Iterable[dict[str, np.ndarray]], *, count: int, mesh: Mesh
) -> tuple[dict[str, float], np.ndarray | None]:
    """({"loss", "top1", "top5", "count"}, confusion [K, K] or None) of `variables` on all of `batches`.

    `step` is a sharded `steps.eval_step`; `batches` are this process's. Sums are added in float64 and divided
    once. Raises RuntimeError unless exactly `count` images were seen.
    """
    total: dict[str, np.ndarray] = {}
    pending = None
    for batch in batches:
        # Read a batch's sums when the next one is on its way: the device does not wait for the host.
        running = step(variables, put_batch(batch, mesh))
        _add(total, pending)
        pending = running
    _add(total, pending)
    if total.get("count") != count:
        raise RuntimeError(f"evaluation saw {total.get('count', 0)} images instead of {count}")
    metrics = {name: float(total[name]) / count for name in ("loss", "top1", "top5")}
    return {**metrics, "count": count}, total.get("confusion")


def _add(total: dict[str, np.ndarray], sums: dict[str, jax.Array] | None) -> None:
    for name, value in (sums or {}).items():
        array = np.asarray(value)
        total[name] = total.get(name, 0) + array.astype(np.float64 if name == "loss" else np.int64)
