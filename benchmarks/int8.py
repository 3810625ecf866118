"""What int8 costs a network, and what each method of post-training quantization gains, in LiteRT.

    python -m benchmarks.int8 --weights=WEIGHTS --calibration=FOLDER_OR_CONFIG --images=FOLDER_OR_CONFIG

Each row is a .tflite file of its own, calibrated on the images of --calibration and run on those of --images. Images
of a config are those of its evaluation split, with their labels.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mobilenet_jax.cli.config import apply_preprocessing, load_config
from mobilenet_jax.data.loader import make_eval_batches
from mobilenet_jax.data.sources import eval_split, open_source
from mobilenet_jax.exporting.folding import read_weights
from mobilenet_jax.exporting.graph import build_graph
from mobilenet_jax.exporting.images import read_images
from mobilenet_jax.exporting.quantize import quantize
from mobilenet_jax.exporting.quantized import as_float
from mobilenet_jax.exporting.runtime import TFLiteRuntime
from mobilenet_jax.exporting.tflite import write_tflite
from mobilenet_jax.weights.card import read_preprocessing
from mobilenet_jax.weights.load import load_weights

_MINMAX: dict[str, Any] = {"ranges": "minmax", "correct_bias": False}
METHODS: dict[str, dict[str, Any]] = {
    "one scale a kernel": {**_MINMAX, "per_tensor": True},
    "one scale a kernel, equalised": {**_MINMAX, "per_tensor": True, "equalize": True},
    "one scale a kernel, biases corrected": {**_MINMAX, "per_tensor": True, "correct_bias": True},
    "min-max": _MINMAX,
    "min-max, equalised": {**_MINMAX, "equalize": True},
    "min-max, biases corrected": {**_MINMAX, "correct_bias": True},
    "mse": {**_MINMAX, "ranges": "mse"},
    "mse, biases corrected": {"ranges": "mse"},
    "percentile": {"correct_bias": False},
    "percentile, biases corrected": {},  # the default
    "percentile, biases corrected, equalised": {"equalize": True},
}
BATCH = 50


class Labelled(NamedTuple):
    """Images as they come out of the preprocessing, and their labels if they have some."""

    pixels: np.ndarray  # uint8 [N, S, S, 3]
    labels: np.ndarray | None  # [N]


def read_labelled(where: str, card: dict, *, count: int) -> Labelled:
    """Read the images to test on: of a folder, without labels, or the evaluation split of a config file."""
    if ".py" not in where:
        return Labelled(read_images(where, card, count=count).pixels, None)
    config: Any = load_config(where, [])
    apply_preprocessing(config, card, [])
    source = open_source(config.data, eval_split(config.data))
    batches, _ = make_eval_batches(config.data, process_index=0, process_count=1, device_count=1, source=source)
    parts = [(batch["images"][batch["mask"]], batch["labels"][batch["mask"]]) for batch in batches]
    images, labels = (np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))
    return Labelled(images, labels)


def run(data: bytes, inputs: np.ndarray) -> np.ndarray:
    """Return the logits of a file for all inputs."""
    runtime = TFLiteRuntime(data)
    parts = range(0, len(inputs), BATCH)
    return np.concatenate([runtime(inputs[i : i + BATCH]) for i in parts])


def describe(name: str, data: bytes, logits: np.ndarray, wanted: np.ndarray, labels: np.ndarray | None) -> str:
    """Return the row of a file: size, error of the logits over their scale, and what its answers are worth."""
    error = np.sqrt(np.mean((logits - wanted) ** 2)) / np.std(wanted)
    same = int((logits.argmax(1) == wanted.argmax(1)).sum())
    cells = [name, f"{len(data) / 1e6:.2f}", f"{error:.3f}", f"{same:,} of {len(wanted):,}"]
    if labels is not None:
        cells.append(f"{100 * np.mean(logits.argmax(1) == labels):.2f}")
    return f"| {' | '.join(cells)} |"


def measure(flags: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table."""
    model, variables, card = load_weights(flags.weights, flags.name)
    given = read_preprocessing(card, source="the weights")
    graph = build_graph(model.spec, given.image_size)
    weights = read_weights(graph, variables)
    mean, std = (np.array(levels, np.float32) for levels in (given.mean, given.std))
    calibration = (read_images(flags.calibration, card, count=flags.calibrate).pixels - mean) / std
    test = read_labelled(flags.images, card, count=flags.test)
    inputs = (test.pixels - mean) / std
    yield f"{len(calibration)} images for calibration, {len(inputs):,} to test on"
    yield ""
    accuracy = "" if test.labels is None else " accuracy % |"
    yield f"| file | MB | error of the logits | same class as float |{accuracy}"
    yield f"|---|---:|---:|---:|{'---:|' if accuracy else ''}"
    data = write_tflite(as_float(graph, weights), batch=None)
    wanted = run(data, inputs)
    yield describe("float", data, wanted, wanted, test.labels)
    for name, options in METHODS.items():
        if flags.methods and name not in flags.methods.split(";"):
            continue
        start = time.perf_counter()
        data = write_tflite(quantize(graph, weights, calibration, **options), batch=None)
        print(f"{name}: {time.perf_counter() - start:.1f} s to make", file=sys.stderr)
        yield describe(name, data, run(data, inputs), wanted, test.labels)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True, help="a file, the workdir of a run, or a name")
    parser.add_argument("--name", help="the model in the weights, if they fit several")
    parser.add_argument("--calibration", required=True, help="a folder of images, or a config file")
    parser.add_argument("--images", required=True, help="a folder of images, or a config file: the images to test on")
    parser.add_argument("--calibrate", type=int, default=128, help="images to calibrate on; default: 128")
    parser.add_argument("--test", type=int, default=10_000, help="images to test on, at most; default: 10,000")
    parser.add_argument("--methods", help=f"some rows, separated by semicolons; default: {'; '.join(METHODS)}")
    for line in measure(parser.parse_args(argv)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
