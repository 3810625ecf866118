"""Measures of activations: dead and saturated units, the rank of bottlenecks, the answers of int8 weights.

Images are measured batch by batch, in constant memory. Linen's method interceptors read the outputs of layers, so that
the measured network is the one that predicts.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from mobilenet_jax.diagnosis.measures import Moments, compare_logits, measure_rank
from mobilenet_jax.models.activations import ACTIVATIONS
from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.layers import ConvNorm, Dense, normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.ops import ConvOp, DenseOp

# (floor, ceiling): the outputs that an activation gives to a whole range of inputs. These are 0 for ReLU, 0 and 6 for
# ReLU6, and 0 for h-swish (inputs up to -3). A unit there passes on no information and no gradient. GELU has neither.
PLATEAUS: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hard_swish": (0.0, math.inf),
}
Batch = dict[str, np.ndarray]


def needed_units(op: ConvOp | DenseOp) -> int | None:
    """Return how many outputs of a 1x1 convolution must be off the plateaus to keep all information of a pixel.

    At most min(C_in, C_out) dimensions pass through the convolution. With fewer active units, some of them are lost at
    that pixel (1801.04381, Lemma 2 in Appendix A). None if the kernel also looks at other pixels.
    """
    return min(op.in_channels, op.filters) if isinstance(op, ConvOp) and op.kernel == 1 and not op.pooled else None


def capture(model: MobileNet, variables: dict, images: jax.Array) -> tuple[jax.Array, dict, dict]:
    """Return (logits, {path: activated output [B, H, W, C] of each layer with a plateau}, {block: output})."""
    ops = {layer.path: layer.op for layer in list_layers(model.spec, variables)}
    outputs, blocks = {}, {}

    def record(run: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        result, module = run(*args, **kwargs), context.module
        path = "/".join(module.path)
        if context.method_name != "__call__":
            return result
        if isinstance(module, ConvNorm | Dense) and path in ops and ops[path].activation in PLATEAUS:
            # The network applies the activation of a hidden dense layer outside the layer.
            dense = isinstance(module, Dense)
            activated = ACTIVATIONS[ops[path].activation](result)[:, None, None, :] if dense else result
            outputs[path] = activated
        elif path.startswith("block_") and "/" not in path:
            blocks[path] = result[0] if isinstance(result, tuple) else result
        return result

    with nn.intercept_methods(record):
        logits: Any = model.apply(variables, images, train=False)
    return logits, outputs, blocks


def count_plateaus(output: jax.Array, mask: jax.Array, activation: str, needed: int | None) -> dict[str, jax.Array]:
    """Count the units of an activated output [B, H, W, C] that are on plateaus, in the images that mask [B] marks.

    Returns:
      {"pixels", "floor": units [C] at the floor, "ceiling": units [C] at the ceiling}; with `needed`, also {"active":
      units on no plateau, "fewest": the smallest number of active units in a pixel, "lost": pixels with fewer active
      units than `needed`}.
    """
    floor, ceiling = PLATEAUS[activation]
    shown = mask[:, None, None, None]
    at_floor, at_ceiling = (output == floor) & shown, (output >= ceiling) & shown
    found = {"pixels": jnp.sum(mask) * output.shape[1] * output.shape[2]}
    found |= {"floor": jnp.sum(at_floor, axis=(0, 1, 2)), "ceiling": jnp.sum(at_ceiling, axis=(0, 1, 2))}
    if needed is None:
        return found
    active = jnp.sum(~(at_floor | at_ceiling), axis=-1)
    shown = mask[:, None, None]
    return found | {
        "active": jnp.sum(jnp.where(shown, active, 0)),
        "fewest": jnp.min(jnp.where(shown, active, output.shape[-1])),
        "lost": jnp.sum((active < needed) & shown),
    }


def sum_moments(output: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (count, mean [C], sums of products of deviations from it [C, C]) of the pixels of images in mask [B]."""
    pixels = output.reshape(-1, output.shape[-1]).astype(jnp.float32)
    shown = jnp.repeat(mask, pixels.shape[0] // mask.shape[0])[:, None]
    count = jnp.sum(shown)
    mean = jnp.sum(jnp.where(shown, pixels, 0), axis=0) / jnp.maximum(count, 1)
    centred = jnp.where(shown, pixels - mean[None, :], 0)
    return count, mean, jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("model", "mean", "std"))
def measure_batch(
    variables: dict,
    images: jax.Array,
    mask: jax.Array,
    *,
    model: MobileNet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[jax.Array, dict, dict]:
    """Return (logits, {path: `count_plateaus`}, {block: `sum_moments`}) of images uint8 [B, S, S, 3] and a mask [B]."""
    logits, outputs, blocks = capture(model, variables, normalise_images(images, mean, std))
    ops = {layer.path: layer.op for layer in list_layers(model.spec, variables)}
    counts = {p: count_plateaus(y, mask, ops[p].activation, needed_units(ops[p])) for p, y in outputs.items()}
    return logits, counts, {name: sum_moments(x, mask) for name, x in blocks.items()}


@functools.partial(jax.jit, static_argnames=("model", "mean", "std"))
def _answer(variables: dict, images: jax.Array, *, model: MobileNet, mean: tuple, std: tuple) -> Any:
    return model.apply(variables, normalise_images(images, mean, std), train=False)


class Tally:
    """The sums over all batches, on the host."""

    def __init__(self):
        self.images = 0
        self.counts: dict[str, dict[str, Any]] = {}
        self.moments: dict[str, Moments] = {}
        self.answers: dict[str, list[float]] = {}  # kind of quantisation -> [same best class, sum of KL]

    def add(self, mask: np.ndarray, logits: np.ndarray, others: dict[str, np.ndarray], counts: dict, moments: dict):
        """Add a batch: its mask [B], the results of `measure_batch`, and the logits [B, K] of quantised networks."""
        self.images += int(mask.sum())
        for path, found in counts.items():
            total = self.counts.setdefault(path, {})
            for key, value in found.items():
                before = total.get(key)
                added = np.asarray(value).astype(np.int64)
                total[key] = (
                    added if before is None else np.minimum(before, added) if key == "fewest" else before + added
                )
        for name, (count, mean, scatter) in moments.items():
            self.moments.setdefault(name, Moments()).add(int(count), np.asarray(mean), np.asarray(scatter))
        for kind, other in others.items():
            same, divergence = compare_logits(logits[mask], other[mask])
            total = self.answers.setdefault(kind, [0, 0.0])
            total[0], total[1] = total[0] + same, total[1] + divergence

    def summarise(self, ops: dict[str, ConvOp | DenseOp]) -> tuple[dict, list[dict], dict | None]:
        """Return ({path: a layer's "activations"}, bottlenecks, quantisation) of the report; see `report.py`."""
        layers = {path: _summarise_counts(found, ops[path]) for path, found in self.counts.items()}
        bottlenecks = [
            {"row": name, "channels": len(found.mean), **measure_rank(found.variances())}
            for name, found in self.moments.items()
        ]
        answers = {
            kind: {"agreement": same / self.images, "kl": divergence / self.images}
            for kind, (same, divergence) in self.answers.items()
        }
        return layers, bottlenecks, answers or None


def _summarise_counts(found: dict[str, Any], op: ConvOp | DenseOp) -> dict:
    pixels = int(found["pixels"])
    units = pixels * op.filters
    summary: dict = {
        "floor_share": float(found["floor"].sum() / units),
        "ceiling_share": float(found["ceiling"].sum() / units) if PLATEAUS[op.activation][1] < math.inf else None,
        "dead_channels": np.flatnonzero(found["floor"] == pixels).tolist(),
        "saturated_channels": np.flatnonzero(found["ceiling"] == pixels).tolist(),
        "active_units": None,
    }
    if "lost" in found:
        summary["active_units"] = {
            "needed": needed_units(op),
            "mean": float(found["active"] / pixels),
            "fewest": int(found["fewest"]),
            "lost_pixels": float(found["lost"] / pixels),
        }
    return summary


def measure_activations(
    model: MobileNet,
    variables: dict,
    batches: Iterable[Batch],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    quantised: dict[str, dict],
    report: Callable[[int], object] = lambda images: None,
) -> Tally:
    """Measure batches {"images" uint8 [B, S, S, 3], "mask" [B]} of one shape.

    Args:
      model: the network.
      variables: its variables.
      batches: the images, as the network expects them before they are normalised.
      mean: grey levels, subtracted from the images.
      std: grey levels, by which the images are divided.
      quantised: {kind: rounded variables}; the network's answers with them are compared with its own.
      report: a function that is called with the number of images so far.
    """
    options: dict[str, Any] = {"model": model, "mean": tuple(mean), "std": tuple(std)}
    if model.spec.num_classes == 0:
        quantised = {}  # a vector of features has no best class to compare
    variables, quantised, tally = jax.device_put(variables), jax.device_put(quantised), Tally()
    for batch in batches:
        images, mask = batch["images"], batch["mask"]
        measured = measure_batch(variables, images, mask, **options)
        answers = {kind: _answer(rounded, images, **options) for kind, rounded in quantised.items()}
        (logits, counts, moments), others = jax.device_get((measured, answers))
        tally.add(mask, logits, others, counts, moments)
        report(tally.images)
    return tally
