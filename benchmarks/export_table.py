"""Export every model to TFLite and ONNX and print how far the files are from JAX, as a table in Markdown.

    python -m benchmarks.export_table                                    every model at width 1
    python -m benchmarks.export_table --width=0.5 mobilenet_v2           these models at another width

Weights are drawn at random, with running statistics and biases that are not the identity, because the numbers of a
trained network are not needed to see whether a file computes the same. The columns of milliseconds are medians of one
image on one thread, beside JAX in turns; leave other work off the machine while they are measured. The exit code is 1
if a model could not be exported.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.startup import configure_memory
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS

FORMATS = ("tflite", "onnx")
_BOUNDS = {"mean": (-0.5, 0.5), "bias": (-0.5, 0.5), "gamma": (0.05, 0.15)}  # other leaves: 0.5 to 1.5
_HEADER = (
    "| model | TFLite, MB | difference, LiteRT | difference, ONNX Runtime | operations of TFLite | "
    "LiteRT, ms | ONNX Runtime, ms | JAX, ms |\n|---|---:|---:|---:|---|---:|---:|---:|"
)


def draw_variables(spec: Spec) -> dict:
    """Return variables in which no batch norm, bias or layer scale is the identity.

    Layer scales are near 0.1: at 1, the attention of a random network sees maps of 1e10, and one rounding of its logits
    changes which pixel it looks at.
    """
    from flax import traverse_util

    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.models.network import MobileNet

    rng = np.random.default_rng(1)
    leaves: dict[Any, Any] = traverse_util.flatten_dict(init_variables(MobileNet(spec), seed=0))
    for path, leaf in leaves.items():
        if path[-1] != "kernel":
            low, high = _BOUNDS.get(path[-1], (0.5, 1.5))
            leaves[path] = rng.uniform(low, high, leaf.shape).astype(np.float32)
    return traverse_util.unflatten_dict(leaves)


def make_row(name: str, width: float, convention: str, image_size: int) -> str:
    """Return the row of a model; raise what `export_weights` raises."""
    from mobilenet_jax import create_model, export_weights
    from mobilenet_jax.weights.card import HALF, make_card

    model = create_model(name, width=width, convention=convention)
    card = make_card(
        name=name,
        model=name,
        width=width,
        convention=convention,
        spec=model.spec,
        preprocessing=replace(HALF, image_size=image_size),
        class_names=None,
        source={"file": "random", "sha256": "none"},
    )
    weights, reports = (model, draw_variables(model.spec), card), {}
    for kind in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            reports[kind] = export_weights(weights, format=kind, out=folder, batch=1)
    tflite, onnx = (reports[kind] for kind in FORMATS)
    operations = ", ".join(f"{count} {kind}" for kind, count in sorted(tflite["operations"].items()))
    times = [reports[kind]["latency_ms"]["1 thread"] for kind in FORMATS]
    cells = (
        f"{name}{'' if width == 1 else f', width {width:g}'}",
        f"{tflite['bytes'] / 1e6:.2f}",
        f"{tflite['max_difference']:.1e}",
        f"{onnx['max_difference']:.1e}",
        operations,
        f"{times[0]['tflite']:.1f}",
        f"{times[1]['onnx']:.1f}",
        f"{times[0]['jax']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--convention", choices=CONVENTIONS, default="keras")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--compilation_cache", default="off")
    flags = parser.parse_args()
    configure_memory(flags.compilation_cache)
    print(_HEADER)
    failed = 0
    for name in flags.models or MODELS:
        try:
            print(make_row(name, flags.width, flags.convention, flags.image_size), flush=True)
        except (ValueError, RuntimeError) as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
