"""The result of a run: numbers, curves and the confusion matrix of its last step."""

import io
import json
from typing import Any

import jax
import numpy as np
from absl import logging

from mobilenet_jax import plots
from mobilenet_jax.training.build import Setup
from mobilenet_jax.training.evaluate import StateEvaluation
from mobilenet_jax.training.finite import NonFiniteError, find_non_finite
from mobilenet_jax.training.log import Log
from mobilenet_jax.training.steps import TrainState
from mobilenet_jax.workdir.files import write_atomic, write_json_atomic
from mobilenet_jax.workdir.metrics import read_metrics


def read_result(setup: Setup, step: int) -> dict | None:
    """Return result.json if the run has done all its `step` steps and the file is of that step, otherwise None.

    A run that was made longer and then killed still has the result of its shorter self. A file that a crash of the
    machine has damaged counts as missing, with a warning: the result is computed again.
    """
    path = setup.workdir / "result.json"
    if step < setup.plan.total_steps or not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
        return result if result["step"] == step else None
    except (ValueError, TypeError, KeyError) as error:
        logging.warning("%s is damaged (%s); it is written again", path, error)
        return None


def write_result(setup: Setup, state: TrainState, evaluation: StateEvaluation, log: Log) -> dict:
    """Return the result of the last step, of the averages if there are any; the first process writes it.

    Raises NonFiniteError if the loss is not finite.
    """
    step, best = int(state.step), "eval" if state.ema is None else "eval_ema"
    metrics = {name: evaluation.metrics[f"{best}/{name}"] for name in ("loss", "top1", "top5", "count")}
    if what := find_non_finite({f"{best}/loss": metrics["loss"]}):
        raise NonFiniteError(what, step, log.learning_rate(step))
    result = {
        "step": step,
        "epoch": step / setup.plan.steps_per_epoch,
        "variables": "last" if state.ema is None else "averaged",
        **metrics,
        "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "trained": count_trained(setup, state.params),
        "skipped": log.skipped,
    }
    if jax.process_index() == 0:
        draw_result(setup, evaluation.confusion)
        write_json_atomic(setup.workdir / "result.json", result)
    return result


def draw_result(setup: Setup, confusion: np.ndarray | None) -> None:
    """Write curves.png and, if there is a confusion matrix, confusion.csv and confusion.png."""
    workdir = setup.workdir
    if confusion is not None:
        table = io.StringIO()
        np.savetxt(table, confusion, fmt="%d", delimiter=",")
        write_atomic(workdir / "confusion.csv", table.getvalue())
        names = setup.info.class_names
        # A model may have more classes than its data has names.
        names = (*names, *map(str, range(len(names), len(confusion))))
        plots.draw_confusion(confusion, names, workdir / "confusion.png")
    title = f"{setup.config.name} on {setup.config.data.source}"
    plots.draw_curves(read_metrics(workdir), workdir / "curves.png", title=title)


def count_trained(setup: Setup, params: Any) -> int:
    """Return the number of parameters that are trained in some phase of the run."""
    if setup.frozen is None or setup.plan.freeze_steps < setup.plan.total_steps:
        return sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = jax.tree.map(lambda leaf, frozen: 0 if frozen else leaf.size, params, setup.frozen)
    return sum(jax.tree.leaves(sizes))
