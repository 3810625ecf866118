"""The tasks of a run: the whole network on images, in float or int8, or its classifier on features computed once.

Each is a `Task`, so the loop does not know which one it trains.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from mobilenet_jax.data.loader import EvalBatches, TrainIterator, make_eval_batches, make_train_iterator
from mobilenet_jax.data.sources import Source, eval_split
from mobilenet_jax.exporting.graph import build_graph
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.training.build import Setup
from mobilenet_jax.training.linear_probe import Features, LinearProbe, compute_features, make_feature_step
from mobilenet_jax.training.quantized import CALIBRATION_BATCHES, QuantizedNetwork, measure_ranges, with_ranges
from mobilenet_jax.training.recalibrate import make_stats_step, measure_stats
from mobilenet_jax.training.sharding import replicate
from mobilenet_jax.training.steps import TrainState


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its training stream and its evaluation set."""

    network: MobileNet | QuantizedNetwork | LinearProbe
    mean: tuple[float, ...]  # subtracted from what the stream holds
    std: tuple[float, ...]  # what the difference is divided by
    iterator: TrainIterator
    eval_batches: EvalBatches
    eval_count: int
    seconds: float = 0.0  # that preparing the task took


def get_process() -> dict[str, Any]:
    """Return the arguments by which the loader gives this process its part of each batch."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def open_images(setup: Setup) -> Task:
    """Return the task of training the whole network on images, as train.quantize says. Nothing is read yet."""
    config = setup.config
    batches, count = make_eval_batches(
        config.data, **get_process(), device_count=setup.mesh.size, source=setup.splits.evaluation
    )
    return Task(
        network=setup.model if config.train.quantize is None else make_quantized_network(setup),
        mean=config.data.mean,
        std=config.data.std,
        iterator=make_train_iterator(config.data, seed=config.seed, **get_process(), source=setup.splits.train),
        eval_batches=batches,
        eval_count=count,
    )


def make_quantized_network(setup: Setup) -> QuantizedNetwork:
    """Return the int8 form of the setup's model."""
    config = setup.config
    return QuantizedNetwork(setup.model.spec, config.data.image_size, config.train.range_decay)


def calibrate_ranges(setup: Setup, task: Task, state: TrainState) -> TrainState:
    """Return the state with the ranges that the float network has on the first batches of the training stream.

    The stream itself stays where it is.
    """
    position = task.iterator.get_state()
    batches = ({"images": next(task.iterator)["images"]} for _ in range(CALIBRATION_BATCHES))
    graph = build_graph(setup.model.spec, setup.config.data.image_size)
    ranges = measure_ranges(graph, state, batches, mesh=setup.mesh, mean=task.mean, std=task.std)
    task.iterator.set_state(position)
    return with_ranges(state, replicate(ranges, setup.mesh))


def open_features(setup: Setup, images: Task, state: TrainState) -> Task:
    """Return the task of training the classifier on features that the rest of the network computes once, here.

    The stream continues at the position of `images`, whose iterator is closed.
    """
    start, data, names = time.perf_counter(), setup.config.data, setup.info.class_names
    place = {**get_process(), "device_count": setup.mesh.size}
    step = make_feature_step(setup.model, setup.mesh, mean=images.mean, std=images.std)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def compute(split: str, source: Source) -> Features:
        batches, _ = make_eval_batches(data, **place, split=split, source=source)
        vectors, labels = compute_features(step, variables, batches, mesh=setup.mesh)
        return Features(vectors, labels, name=split, class_names=names)

    train, test = compute("train", setup.splits.train), compute(eval_split(data), setup.splits.evaluation)
    position = images.iterator.get_state()
    images.iterator.close()
    iterator = make_train_iterator(data, seed=setup.config.seed, **get_process(), features=train)
    iterator.set_state(position)
    batches, count = make_eval_batches(data, **place, features=test)
    return Task(
        network=LinearProbe(setup.model.spec),
        mean=(0.0,),
        std=(1.0,),
        iterator=iterator,
        eval_batches=batches,
        eval_count=count,
        seconds=time.perf_counter() - start,
    )


def recompute_stats(setup: Setup, task: Task, state: TrainState) -> TrainState:
    """Return the state with batch-norm statistics measured over the plan's batches, also those of the averages.

    The batches are the first of the training stream; the stream itself stays where it is.
    """
    averages: dict[str, Any] | None = state.ema
    kinds = [{"params": state.params, "batch_stats": state.batch_stats}]
    kinds += [] if averages is None else [averages]
    position = task.iterator.get_state()
    task.iterator.set_state({**position, "next_batch": 0})
    batches = ({"images": next(task.iterator)["images"]} for _ in range(setup.plan.stats_batches))
    step = make_stats_step(setup.model, setup.mesh, mean=task.mean, std=task.std)
    stats, *averaged = replicate(measure_stats(step, kinds, batches, mesh=setup.mesh), setup.mesh)
    task.iterator.set_state(position)
    ema = None if averages is None else {**averages, "batch_stats": averaged[0]}
    return replace(state, batch_stats=stats, ema=ema)
