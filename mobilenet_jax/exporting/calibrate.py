"""The ranges of a network's tensors, measured on images: what int8 codes have to cover."""

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import IMAGES, Graph
from mobilenet_jax.exporting.integer import list_ranges
from mobilenet_jax.exporting.interpreter import run_graph

BATCH = 8  # images whose maps are in memory at once
_BINS = 2048
_KEPT = 0.9999  # share of the values that the method "percentile" keeps on each side of 0
_SHRINK = np.linspace(0.3, 1.0, 15)  # factors of either end that the method "mse" tries


def measure_ranges(
    graph: Graph, weights: Mapping[str, Weights], images: np.ndarray, *, method: str = "minmax"
) -> dict[str, np.ndarray]:
    """Return the range, float32 [2], of every tensor that `list_ranges` names, in the float network.

    Args:
      graph: the network.
      weights: float32, of `folding.read_weights`.
      images: [N, H, W, C], as the graph's input takes them.
      method: "minmax", the extremes; "percentile", without the largest 0.01% of the values on either side; "mse", the
        range with the smallest mean squared error of rounding and saturation. Images and output always have their
        extremes: the largest logit, which is the answer, must not be cut off.

    Raises ValueError for an unknown method, images of another shape, or none at all.
    """
    if method not in METHODS:
        raise ValueError(f"ranges is {method!r}; valid: {', '.join(METHODS)}")
    check_images(graph, images)
    extremes = _measure_extremes(graph, weights, images)
    if method == "minmax":
        return extremes
    counts = _count_values(graph, weights, images, extremes)
    chosen = {name: METHODS[method](counts[name], *extremes[name]) for name in counts}
    return {**extremes, **chosen}


def check_images(graph: Graph, images: np.ndarray) -> None:
    """Raise ValueError unless images [N, H, W, C] fit the graph and there is at least one."""
    if images.ndim != 4 or images.shape[1:] != graph.input_shape or not len(images):
        raise ValueError(f"the calibration images are {images.shape}; valid: [1 or more, {graph.input_shape}]")


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


def _measure_extremes(graph, weights, images) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for batch in _batches(images):
        ends: dict[str, np.ndarray] = jax.device_get(_find_extremes(graph, dict(weights), batch))
        found = {name: join(found.get(name, pair), pair) for name, pair in ends.items()}
    return found


def find_extremes(x: jax.Array) -> jax.Array:
    """Return the smallest and the largest number of x, float32 [2]."""
    return jnp.stack([jnp.min(x), jnp.max(x)])


def join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the range [2] that covers two ranges."""
    return np.stack([np.minimum(first[0], second[0]), np.maximum(first[1], second[1])])


@functools.partial(jax.jit, static_argnames="graph")
def _find_extremes(graph, weights, images):
    values = run_graph(graph, weights, images)
    return {name: find_extremes(values[name]) for name in list_ranges(graph)}


@functools.partial(jax.jit, static_argnames="graph")
def _run(graph, weights, images):
    values = run_graph(graph, weights, images)
    return {name: values[name] for name in list_ranges(graph)}


def _count_values(graph, weights, images, extremes) -> dict[str, np.ndarray]:
    """Return a histogram of each tensor, with equal bins between its extremes."""
    counts = {name: np.zeros(_BINS, np.int64) for name in extremes if name not in (IMAGES, graph.output)}
    for batch in _batches(images):
        values = _run(graph, dict(weights), batch)
        for name in counts:
            low, high = extremes[name]
            bins = (np.ravel(values[name]) - low) * np.float32(_BINS / max(high - low, 1e-12))
            counts[name] += np.bincount(np.clip(bins.astype(np.int32), 0, _BINS - 1), minlength=_BINS)
    return counts


def _edges(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, _BINS + 1)


def _keep_extremes(counts: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.array([low, high], np.float32)


def _keep_percentile(counts: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = np.cumsum(counts) / counts.sum()
    edges = _edges(low, high)
    first = np.searchsorted(shares, 1 - _KEPT, side="right")  # the first bin that is kept
    last = min(int(np.searchsorted(shares, _KEPT)), _BINS - 1)
    return np.array([edges[first], edges[last + 1]], np.float32)


def _keep_least_error(counts: np.ndarray, low: float, high: float) -> np.ndarray:
    edges = _edges(low, high)
    values = (edges[1:] + edges[:-1]) / 2

    def error(ends: tuple[float, float]) -> float:
        step = max(ends[1] - ends[0], 1e-12) / 255
        rounded = np.round((np.clip(values, *ends) - ends[0]) / step) * step + ends[0]
        return float(counts @ (rounded - values) ** 2)

    lows = [min(low, 0.0) * factor for factor in _SHRINK] if low < 0 else [0.0]
    highs = [max(high, 0.0) * factor for factor in _SHRINK] if high > 0 else [0.0]
    return np.array(min(((a, b) for a in lows for b in highs), key=error), np.float32)


METHODS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "minmax": _keep_extremes,
    "percentile": _keep_percentile,
    "mse": _keep_least_error,
}
