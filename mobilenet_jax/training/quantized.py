"""Quantization-aware training: the network as int8 kernels run it, with gradients straight through the roundings.

The forward pass is `exporting.integer`, so what is trained and evaluated is what an int8 file computes. Batch norm is
folded with its running statistics, which stay as they are. The collection `ranges` holds the range of each tensor.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from mobilenet_jax.exporting.arithmetic import decode
from mobilenet_jax.exporting.calibrate import find_extremes, join
from mobilenet_jax.exporting.folding import fold_weights
from mobilenet_jax.exporting.graph import Graph, build_graph
from mobilenet_jax.exporting.integer import list_ranges, make_encodings, quantize_layers, run_levels
from mobilenet_jax.exporting.interpreter import run_graph
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.sharding import put_batch, shard_eval_step
from mobilenet_jax.training.steps import TrainState

CALIBRATION_BATCHES = 8  # of the training stream, which give the ranges before the first step


class QuantizedNetwork(nn.Module):
    """The int8 form of a network, on the network's own parameters and statistics.

    Nothing is dropped in training. Training mode moves each range towards the extremes of the batch, which count from
    the next step on; `decay` is the share that a range keeps. With `freeze_ranges` the ranges stay.
    """

    spec: Spec
    image_size: int
    decay: float
    freeze_ranges: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the logits [B, num_classes] of normalised images; they are multiples of their scale."""
        graph = build_graph(self.spec, self.image_size)
        variables: dict[str, Any] = {name: self.variables[name] for name in ("params", "batch_stats")}
        variables["batch_stats"] = lax.stop_gradient(variables["batch_stats"])
        ranges = {name: self.variables["ranges"][name] for name in list_ranges(graph)}
        observed: dict[str, jax.Array] = {}

        def observe(name: str, x: jax.Array) -> None:
            observed[name] = find_extremes(lax.stop_gradient(x))

        encodings = make_encodings(graph, ranges)
        layers = quantize_layers(graph, fold_weights(graph, variables), encodings)
        moves = train and not self.freeze_ranges
        levels = run_levels(graph, layers, encodings, images, observe=observe if moves else None)
        for name in ranges if moves else ():
            moved = self.decay * ranges[name] + (1 - self.decay) * observed[name]
            self.put_variable("ranges", name, moved)
        return decode(levels[graph.output], encodings[graph.output])


def init_ranges(spec: Spec, image_size: int) -> dict[str, np.ndarray]:
    """Return the collection `ranges` before it is measured."""
    return {name: np.zeros(2, np.float32) for name in list_ranges(build_graph(spec, image_size))}


def measure_ranges(
    graph: Graph,
    state: TrainState,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, np.ndarray]:
    """Return the extremes, float32 [2], of each tensor of the float network over all images of the batches."""

    def step(variables: dict, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = normalise_images(batch["images"], mean, std)
        values = run_graph(graph, fold_weights(graph, variables), images)
        return {name: find_extremes(values[name]) for name in list_ranges(graph)}

    sharded = shard_eval_step(step, mesh)
    found: dict[str, np.ndarray] = {}
    for batch in batches:
        ends: dict[str, np.ndarray] = jax.device_get(sharded(state.variables, put_batch(batch, mesh)))
        found = {name: join(found.get(name, pair), pair) for name, pair in ends.items()}
    return found


def with_ranges(state: TrainState, ranges: dict[str, Any]) -> TrainState:
    """Return the state with other ranges, those of the averages too."""
    ema = state.ema and {**state.ema, "ranges": jax.tree.map(jnp.array, ranges)}
    return replace(state, ranges=ranges, ema=ema)
