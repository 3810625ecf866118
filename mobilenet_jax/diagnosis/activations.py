"""What images say, batch by batch at constant memory: dead and saturated units, the rank of bottlenecks, int8 answers.

Outputs of layers are taken as they pass (linen's method interceptors); the network is the one that predicts.
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
from mobilenet_jax.models.layers import ConvNorm, Dense
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.ops import ConvOp, DenseOp
from mobilenet_jax.training.steps import normalise_images

# (floor, ceiling) of an activation's output, where inputs of a whole range have one value: ReLU's 0, ReLU6's 0 and 6,
# and the 0 that h-swish gives to inputs up to -3. A unit there passes nothing on, and no gradient. GELU has neither.
PLATEAUS: dict[str, tuple[float, float]] = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "hard_swish": (0.0, math.inf),
}
Batch = dict[str, np.ndarray]


def needed_units(op: ConvOp | DenseOp) -> int | None:
    """How many outputs of a 1x1 convolution must be off the plateaus for a pixel's input to be recovered, or output.

    What goes through it has min(C_in, C_out) dimensions; with fewer active units some are lost at that pixel
    (1801.04381, Lemma 2 in Appendix A). None where the kernel looks at other pixels too.
    """
    return min(op.in_channels, op.filters) if isinstance(op, ConvOp) and op.kernel == 1 and not op.pooled else None


def capture(model: MobileNet, variables: dict, images: jax.Array) -> tuple[jax.Array, dict, dict]:
    """(logits, {path: activated output [B, H, W, C] of each layer with a plateau}, {block: output}), of images."""
    ops = {layer.path: layer.op for layer in list_layers(model.spec, variables)}
    outputs, blocks = {}, {}

    def record(run: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        result, module = run(*args, **kwargs), context.module
        path = "/".join(module.path)
        if context.method_name != "__call__":
            return result
        if isinstance(module, ConvNorm | Dense) and path in ops and ops[path].activation in PLATEAUS:
            # The activation of a hidden dense layer is the network's to apply.
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
    """Sums over the pixels of the images that mask [B] marks, of an activated output [B, H, W, C].

    {"pixels", "floor" [C], "ceiling" [C]: units there}; with `needed`, also {"active": units on no plateau,
    "fewest": of a pixel, "lost": pixels with fewer than needed}.
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
    """(pixels, mean [C], sums of products of deviations from it [C, C]) over the pixels of the images of mask [B]."""
    pixels = output.reshape(-1, output.shape[-1]).astype(jnp.float32)
    shown = jnp.repeat(mask, pixels.shape[0] // mask.shape[0])[:, None]
    count = jnp.sum(shown)
    mean = jnp.sum(jnp.where(shown, pixels, 0), axis=0) / jnp.maximum(count, 1)
    centred = jnp.where(shown, pixels - mean[None, :], 0)
    return count, mean, jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)


def make_measure(model: MobileNet, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """A compiled (variables, batch) -> (logits, {path: counts}, {block: moments}) for batches of one shape."""

    @jax.jit
    def measure(variables: dict, batch: dict[str, jax.Array]):
        mask = batch["mask"]
        logits, outputs, blocks = capture(model, variables, normalise_images(batch["images"], mean, std))
        ops = {layer.path: layer.op for layer in list_layers(model.spec, variables)}
        counts = {p: count_plateaus(y, mask, ops[p].activation, needed_units(ops[p])) for p, y in outputs.items()}
        return logits, counts, {name: sum_moments(x, mask) for name, x in blocks.items()}

    return measure


class Tally:
    """What batches add up to, on the host."""

    def __init__(self):
        self.images = 0
        self.counts: dict[str, dict[str, Any]] = {}
        self.moments: dict[str, Moments] = {}
        self.answers: dict[str, list[float]] = {}  # kind of quantisation -> [same best class, sum of KL]

    def add(self, mask: np.ndarray, logits: np.ndarray, others: dict[str, np.ndarray], counts: dict, moments: dict):
        """A batch: its mask [B], logits [B, K], quantised networks' logits, and what `make_measure` returns."""
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
        """({path: a layer's "activations"}, bottlenecks, quantisation) of the report, as `report.py` documents them."""
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
    """The tally of all batches {"images" uint8 [B, S, S, 3], "mask" [B]}, one shape, in order.

    Args:
      model: the network; the same for `quantised`, {kind: variables} whose answers are compared with its own.
      mean, std: of the preprocessing, in grey levels.
      report: called with the images so far.
    """
    measure = make_measure(model, mean=mean, std=std)
    answer = jax.jit(functools.partial(_answer, model=model, mean=mean, std=std))
    variables, quantised, tally = jax.device_put(variables), jax.device_put(quantised), Tally()
    for batch in batches:
        given = {key: batch[key] for key in ("images", "mask")}
        running = measure(variables, given), {kind: answer(v, given["images"]) for kind, v in quantised.items()}
        (logits, counts, moments), others = jax.device_get(running)
        if model.spec.num_classes == 0:
            others = {}  # a vector of features has no best class
        tally.add(given["mask"], logits, others, counts, moments)
        report(tally.images)
    return tally


def _answer(variables: dict, images: jax.Array, *, model: MobileNet, mean: tuple, std: tuple) -> Any:
    return model.apply(variables, normalise_images(images, mean, std), train=False)
