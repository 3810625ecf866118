"""Exact evaluation: every image counted once, whatever the batch size, the devices or the hosts."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mobilenet_jax.data.loader import Batch, make_eval_batches
from mobilenet_jax.data.sources import eval_split, open_source
from mobilenet_jax.exporting.contract import Exported
from mobilenet_jax.exporting.runtime import open_classifier
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.training.classes import match_classes, reorder_classes
from mobilenet_jax.training.sharding import make_mesh, put_batch, replicate, shard_eval_step
from mobilenet_jax.training.steps import TrainState, count_answers, eval_step
from mobilenet_jax.training.task import Task, get_process
from mobilenet_jax.training.validate import check_data


class Evaluation(NamedTuple):
    """The counts of an evaluation."""

    metrics: dict[str, float]  # loss, top1, top5, ece, count
    classes: np.ndarray  # int [2, K]: images of each class, and the correct answers among them
    confusion: np.ndarray | None  # int [K, K]: true classes in rows, predicted classes in columns; up to 100 classes


def evaluate(
    step: Callable, variables: dict, batches: Iterable[dict[str, np.ndarray]], *, count: int, mesh: Mesh
) -> Evaluation:
    """Return the metrics of one set of variables, as `evaluate_all` does of several."""
    return evaluate_all(step, {"": variables}, batches, count=count, mesh=mesh)[""]


def evaluate_all(
    step: Callable, kinds: Mapping[str, dict], batches: Iterable[dict[str, np.ndarray]], *, count: int, mesh: Mesh
) -> dict[str, Evaluation]:
    """Return the metrics of each set of variables on all of `batches`, which are read once.

    `step` is a sharded `steps.eval_step`; `batches` are the batches of this process. Sums are added in float64 and
    divided once. `ece` is the expected calibration error of 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599,
    equation 3). Raises RuntimeError unless exactly `count` images were seen.
    """
    totals: dict[str, dict[str, np.ndarray]] = {name: {} for name in kinds}
    pending: dict[str, dict[str, jax.Array]] = {}
    for batch in batches:
        # The sums of a batch are read when the next one is on its way: the device does not wait for the host.
        placed = put_batch(batch, mesh)
        running = {name: step(variables, placed) for name, variables in kinds.items()}
        _add(totals, pending)
        pending = running
    _add(totals, pending)
    return {name: _divide(total, count) for name, total in totals.items()}


def _add(totals: dict[str, dict[str, np.ndarray]], pending: dict[str, dict[str, jax.Array]]) -> None:
    for name, sums in jax.device_get(pending).items():
        for key, array in sums.items():
            added = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
            totals[name][key] = totals[name].get(key, 0) + added


def _divide(total: dict[str, np.ndarray], count: int) -> Evaluation:
    if total.get("count") != count:
        raise RuntimeError(f"evaluation saw {total.get('count', 0)} images instead of {count}")
    metrics = {name: float(total[name]) / count for name in ("loss", "top1", "top5")}
    probability, right = total["calibration"]
    metrics["ece"] = float(np.abs(right - probability).sum()) / count
    return Evaluation({**metrics, "count": count}, total["classes"], total.get("confusion"))


class StateEvaluation(NamedTuple):
    """The evaluation of a training state."""

    metrics: dict[str, float]  # {"eval/top1": ...}, and "eval_ema/top1" ... of the averages if the state has them
    confusion: np.ndarray | None  # of the averages if the state has them


def make_evaluator(task: Task, mesh: Mesh) -> Callable[[TrainState], StateEvaluation]:
    """Return the function that evaluates a state, raw variables and averages, on the images of a task."""
    step = shard_eval_step(functools.partial(eval_step, model=task.network, mean=task.mean, std=task.std), mesh)

    def evaluate_state(state: TrainState) -> StateEvaluation:
        kinds = {"eval": state.variables}
        if state.ema is not None:
            kinds["eval_ema"] = state.ema
        found = evaluate_all(step, kinds, task.eval_batches, count=task.eval_count, mesh=mesh)
        metrics = {f"{kind}/{name}": value for kind, e in found.items() for name, value in e.metrics.items()}
        return StateEvaluation(metrics, list(found.values())[-1].confusion)

    return evaluate_state


def evaluate_weights(weights: tuple[MobileNet, dict, dict] | Exported, data_config) -> dict:
    """Return {"weights", "data", metrics of `Evaluation`, "class_accuracy": {name: share or None}}, as JSON.

    Args:
      weights: (model, variables, card) of `load_weights`, or a file of `read_exported`, which its own runtime computes.
      data_config: config.data of configs/base.py. Its evaluation split is read, and prepared by its keys. The share of
        a class without an image is None.

    Raises:
      ValueError: the data has other classes than the weights, the images are too small, the config is impossible, or
        an exported file takes images of another size.
      UnreadableImageError: an image that cannot be decoded.
    """
    card, spec = (weights.card, weights.spec) if isinstance(weights, Exported) else (weights[2], weights[0].spec)
    mesh = make_mesh()
    check_data(data_config)
    source = open_source(data_config, eval_split(data_config))
    order = match_classes(card["class_names"], spec.num_classes, source.class_names, data=source.name)
    compute_cost(spec, data_config.image_size)  # raises ValueError if the image is too small
    batches, count = make_eval_batches(data_config, **get_process(), device_count=mesh.size, source=source)
    if isinstance(weights, Exported):
        answered, variables = _answer(weights, batches, data_config), {}
        step = functools.partial(_count_exported, order=tuple(order))
    else:
        # At the highest precision, float32 weights have the same metrics on every platform.
        answered, exact = batches, weights[0].clone(precision="highest")
        variables = replicate(reorder_classes(weights[1], order), mesh)
        step = functools.partial(eval_step, model=exact, mean=data_config.mean, std=data_config.std)
    metrics, classes, _ = evaluate(shard_eval_step(step, mesh), variables, answered, count=count, mesh=mesh)
    shares = [right / images if images else None for images, right in classes.T.tolist()]
    named = {"weights": {"name": card["name"], **card["source"]}, "data": source.name}
    return {**named, **metrics, "class_accuracy": dict(zip(source.class_names, shares, strict=True))}


def _answer(exported: Exported, batches: Iterable[Batch], data_config) -> Iterator[Batch]:
    """Yield the batches with the logits of an exported file in the place of the images."""
    size = exported.card["preprocessing"]["image_size"]
    if data_config.image_size != size:
        raise ValueError(f"image_size is {data_config.image_size}; the exported file takes images of {size} px alone")
    classify = open_classifier(exported)
    for batch in batches:
        logits = classify(batch["images"], data_config.mean, data_config.std)
        yield {"logits": logits, "labels": batch["labels"], "mask": batch["mask"]}


def _count_exported(variables: dict, batch: dict[str, jax.Array], *, order: tuple[int, ...]) -> dict[str, jax.Array]:
    del variables
    return count_answers(batch["logits"][:, np.array(order)], batch["labels"], batch["mask"])
