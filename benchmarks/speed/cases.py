"""What a benchmark measures: the cases that the flags of the command ask for."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.zoo import MODELS, make_spec

WHAT = ("train", "infer", "memory", "scaling", "input", "predict", "startup")
PEERS = {
    "flax": "our network as Flax's plain layers compute it, with grouped convolutions",
    "keras": "Keras on JAX",
    "torch": "torchvision, and timm for V1 and V4, channels_last",
    "torch_compile": "the same under torch.compile",
    "litert": "our export in LiteRT (ai-edge-litert, with XNNPACK), inference only",
    "onnx": "our export in ONNX Runtime, inference only",
    "tfdata": "tf.data, input only",
    "ours_fast": "our loader with data.decode = fast, input only",
    "ours_resized": "our loader with data.cache = resized, which has all photographs in memory, input only",
}
# `scaling` changes one of these keys at a time; the other keys have the first value of their flags.
SCALING = {
    "width": (0.35, 0.5, 0.75, 1.0, 1.4),
    "resolution": (96, 128, 160, 192, 224),
    "batch_size": (4, 8, 16, 32, 64),
    "devices": (1, 2, 4),
}
# One option of config.data each. Erasing and mixing apply to every image, so that their whole cost is measured.
AUGMENTATIONS = (
    "color_jitter=0.4",
    "randaugment_layers=2",
    "erasing=1.0",
    "mixup=0.2",
    "cutmix=1.0",
)


PHOTOGRAPH = (500, 375)  # width, height in pixels: the most frequent size in ILSVRC 2012


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure, on every side that supports it."""

    group: str  # a value of WHAT
    what: str  # a key of turns.SIDES
    name: str  # the model, or what the input does
    width: float = 1.0
    resolution: int
    batch_size: int
    devices: int = 1

    def __str__(self) -> str:
        width = f" {self.width:g}" if self.name in MODELS else ""
        devices = f", {self.devices} devices" if self.devices > 1 else ""
        return f"{self.group} {self.name}{width}, {self.resolution} px, batch {self.batch_size}{devices}"


def make_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the flags ask for, in order. Start-up and predictions are whole commands, not cases."""
    sizes = {"resolution": args.resolution[0], "batch_size": args.batch_size[0]}
    for group in args.what:
        if group == "input":
            yield Case(group=group, what="input", name="Inception crop and flip", **sizes)
            for name in AUGMENTATIONS:
                yield Case(group=group, what="augment", name=name, **sizes)
        elif group == "scaling":
            for model in args.models:
                base = Case(group=group, what="train", name=model, width=args.width[0], **sizes)
                moved = (replace(base, **{key: value}) for key, values in SCALING.items() for value in values)
                yield from dict.fromkeys((base, *moved))
        elif group not in ("predict", "startup"):
            for model, *values in itertools.product(args.models, args.width, args.resolution, args.batch_size):
                keys = dict(zip(("width", "resolution", "batch_size"), values, strict=True))
                yield Case(group=group, what=group, name=model, **keys)


def count_work(case: Case, options: dict) -> dict[str, int]:
    """Count the work of one image by the tables of the network.

    Returns:
      {"madds": multiply-adds, "activation_bytes": bytes of the float32 activations that the backward pass needs}; empty
      for a case without a network.

    Raises:
      ValueError: a network that does not exist.
    """
    if case.name not in MODELS:
        return {}
    own = {key: value for key, value in options.items() if key not in ("dtype", "remat", "depthwise_impl", "precision")}
    cost = compute_cost(make_spec(case.name, width=case.width, **own), case.resolution)
    return {"madds": cost.madds, "activation_bytes": 4 * cost.training_elements}
