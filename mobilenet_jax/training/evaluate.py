"""Exact evaluation: every image counted once, whatever the batch size, the devices or the hosts."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mobilenet_jax.data.loader import make_eval_batches
from mobilenet_jax.data.sources import eval_split, open_source
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicate, shard_eval_step
from mobilenet_jax.training.steps import eval_step


class Evaluation(NamedTuple):
    """What was counted on a data set."""

    metrics: dict[str, float]  # loss, top1, top5, ece, count
    classes: np.ndarray  # int [2, K]: images of each class, and those of them answered right
    confusion: np.ndarray | None  # int [K, K]: true classes in rows, predicted ones in columns; up to 100 classes


def evaluate(
    step: Callable, variables: dict, batches: Iterable[dict[str, np.ndarray]], *, count: int, mesh: Mesh
) -> Evaluation:
    """The metrics of `variables` on all of `batches`.

    `step` is a sharded `steps.eval_step`; `batches` are this process's. Sums are added in float64 and divided
    once. `ece` is the expected calibration error of 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599,
    equation 3). Raises RuntimeError unless exactly `count` images were seen.
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
    probability, right = total["calibration"]
    metrics["ece"] = float(np.abs(right - probability).sum()) / count
    return Evaluation({**metrics, "count": count}, total["classes"], total.get("confusion"))


def _add(total: dict[str, np.ndarray], sums: dict[str, jax.Array] | None) -> None:
    for name, value in (sums or {}).items():
        array = np.asarray(value)
        total[name] = total.get(name, 0) + array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def evaluate_weights(weights: tuple[MobileNet, dict, dict], data_config) -> dict:
    """{"weights", "data", metrics of `Evaluation`, "class_accuracy": {name: share or None}} of any weights, as JSON.

    Args:
      weights: (model, variables, card) of `load_weights`.
      data_config: config.data of configs/base.py; its evaluation split is read, prepared as it says. The share of a
        class without an image is None.

    Raises:
      ValueError: classes that are not the weights', images too small for them, or an impossible config.
      UnreadableImageError: an image that cannot be decoded.
    """
    model, variables, card = weights
    source, mesh = open_source(data_config, eval_split(data_config)), make_mesh()
    order = match_classes(card["class_names"], model.spec.num_classes, source.class_names, data=source.name)
    compute_cost(model.spec, data_config.image_size)  # says so if the image is too small
    check_batch_size("data.eval_batch_size", data_config.eval_batch_size, mesh)
    params = {**variables["params"]}
    params["classifier"] = {name: leaf[..., order] for name, leaf in params["classifier"].items()}
    step = functools.partial(eval_step, model=model, mean=data_config.mean, std=data_config.std)
    processes: dict[str, Any] = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches, count = make_eval_batches(data_config, **processes)
    placed = replicate({**variables, "params": params}, mesh)
    metrics, classes, _ = evaluate(shard_eval_step(step, mesh), placed, batches, count=count, mesh=mesh)
    shares = [right / images if images else None for images, right in classes.T.tolist()]
    named = {"weights": {"name": card["name"], **card["source"]}, "data": source.name}
    return {**named, **metrics, "class_accuracy": dict(zip(source.class_names, shares, strict=True))}


def match_classes(known: Sequence[str] | None, count: int, names: Sequence[str], *, data: str) -> list[int]:
    """Which of the weights' `count` classes each class of the data is, by name where the weights know theirs.

    Folders of ImageNet are called by WordNet's numbers, and the order of these is that of the classes.

    Raises ValueError unless they are the same classes.
    """
    if len(names) != count:
        raise ValueError(f"{data} has {len(names)} classes and the weights {count}; they must be the same classes")
    is_wordnet = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    if known is None or list(known) == list(names) or (is_wordnet and count == 1000):
        return list(range(count))
    if odd := sorted(set(names) ^ set(known)):
        raise ValueError(
            f"the classes of {data} and of the weights differ: only one of them has {', '.join(odd[:4])}"
            f"{f' and {len(odd) - 4} more' if len(odd) > 4 else ''}"
        )
    return [list(known).index(name) for name in names]
