"""Weights to a file for another runtime, compared with the network before it is written."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilenet_jax.exporting import EXPORT_FORMATS, QUANTIZATIONS, report
from mobilenet_jax.exporting.contract import KEY, make_contract, read_contract, seal
from mobilenet_jax.exporting.folding import Weights, read_weights
from mobilenet_jax.exporting.graph import Graph, build_graph, with_normalisation
from mobilenet_jax.exporting.images import Images, draw_images, read_images
from mobilenet_jax.exporting.integer import decode, make_trained, simulate
from mobilenet_jax.exporting.interpreter import run_graph
from mobilenet_jax.exporting.quantize import quantize as quantize_network
from mobilenet_jax.exporting.quantized import Quantized, as_float
from mobilenet_jax.exporting.runtime import RUNTIMES, load_package
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.paths import as_path, is_bucket
from mobilenet_jax.weights.card import Preprocessing, check_card, read_preprocessing
from mobilenet_jax.weights.folder import find_weights
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.checkpoint import load_ranges
from mobilenet_jax.workdir.files import write_atomic, write_json_atomic

_CALIBRATION = 256  # images that ranges are measured on
_COMPARED = 16  # images on which the file is compared with the network
_PACKAGES = {  # of each format: (module, package)
    "tflite": (("ai_edge_litert.interpreter", "ai-edge-litert"),),
    "onnx": (("onnx", "onnx"), ("onnxruntime", "onnxruntime")),
    "stablehlo": (("flatbuffers", "flatbuffers"),),
}


class ParityError(RuntimeError):
    """A file whose answers differ from the network's; the message is one sentence."""


@dataclass(frozen=True)
class _Job:
    """The network of an export, and the choices of its caller."""

    model: MobileNet
    variables: dict
    card: dict
    given: Preprocessing
    graph: Graph
    format: str
    batch: int | None
    preprocess: bool
    quantize: str
    float_ends: bool

    def inputs(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the file takes for uint8 images."""
        if self.preprocess:
            return pixels
        mean, std = (np.array(levels, np.float32) for levels in (self.given.mean, self.given.std))
        return (pixels.astype(np.float32) - mean) / std


def export_weights(
    weights: str | os.PathLike | tuple[MobileNet, dict, dict],
    *,
    format: str,  # noqa: A002
    out: str | os.PathLike | None = None,
    batch: int | str | None = None,
    resolution: int | None = None,
    preprocess: bool = False,
    quantize: str = "none",
    calibration: str | None = None,
    per_tensor: bool = False,
    float_ends: bool = False,
    name: str | None = None,
    select: str | None = None,
    offline: bool = False,
) -> dict:
    """Write weights as a file for another runtime, with its contract and a report; return the report.

    The folder `out` gets NAME.tflite, .onnx or .stablehlo, NAME.json (`contract.make_contract`) and report.json
    (`report.compare_logits`, size, operations, latency). Nothing is written if the comparison fails. The format web
    writes a page instead, see `web.export_page`.

    Args:
      weights: a file, a workdir or a name, or (model, variables, card) of `load_weights`.
      format: tflite | onnx | stablehlo | web.
      out: a folder; default: exports/NAME_FORMAT.
      batch: the number of images at once, or "dynamic"; default: 1 in TFLite, "dynamic" elsewhere.
      resolution: pixels of a side; default: the card's.
      preprocess: normalise inside, so that the file takes uint8 pixels.
      quantize: none | int8 | float16 (kernels). The int8 file of a run with train.quantize = "int8" is what it trained.
      calibration: a folder of images or a config file, for the ranges of int8 and for the comparison; see
        `images.read_images`. Without it, the comparison is on random pixels. A run that trained in int8 has its own
        ranges and needs none.
      per_tensor: int8: one scale for all filters of a layer.
      float_ends: int8: a .tflite file takes and returns float32.
      name, select, offline: see `load_weights`.

    Raises:
      ParityError: the file's answers are farther from the network's than `report.LIMIT`.
      MissingPackageError: the extra `export` is not installed.
      ValueError, OSError: an impossible value, or weights or images that cannot be read.
    """
    check_choice("format", format, EXPORT_FORMATS)
    check_choice("quantize", quantize, QUANTIZATIONS)
    if format == "web":
        from mobilenet_jax.exporting.web import export_page  # it calls this function for its networks

        if preprocess or float_ends or batch not in (None, 1):
            raise ValueError("preprocess, float_ends and batch are not for the format web: the page decides them")
        return export_page(
            weights,
            out=out,
            resolution=resolution,
            quantize=quantize,
            calibration=calibration,
            per_tensor=per_tensor,
            name=name,
            select=select,
            offline=offline,
        )
    ranges = _load_ranges(weights) if quantize == "int8" else {}
    _check_flags(format, quantize, calibrated=bool(calibration or ranges), per_tensor=per_tensor, float_ends=float_ends)
    if ranges and per_tensor:
        raise ValueError(f"per_tensor: {weights} was trained with a scale for each filter")
    size = _read_batch(batch, format)
    for module, package in _PACKAGES[format]:
        load_package(module, what=f"format {format}", package=package)
    model, variables, card = (
        weights if isinstance(weights, tuple) else load_weights(weights, name, select=select, offline=offline)
    )
    if model.spec.in_channels != 3:
        raise ValueError(f"the weights {card['name']} take {model.spec.in_channels} channels; images have 3")
    card = {**card, "spec": to_json(model.spec)}
    check_card(card, source="these weights")
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    if resolution is not None:
        given = replace(given, image_size=resolution)
        card = {**card, "preprocessing": {**card["preprocessing"], "image_size": resolution}}
    graph = build_graph(model.spec, given.image_size)
    if preprocess:
        graph = with_normalisation(graph, given.mean, given.std)
    job = _Job(model, variables, card, given, graph, format, size, preprocess, quantize, float_ends)
    images = read_images(calibration, card, count=_CALIBRATION) if calibration else draw_images(given, count=_COMPARED)
    network = _make_network(job, images, ranges, per_tensor=per_tensor)
    data, contract = _write(job, network)
    return _save(job, data, contract, _compare(job, network, data, images), out)


def _load_ranges(weights: str | os.PathLike | tuple) -> dict[str, np.ndarray]:
    """Return the ranges of a run that trained in int8; {} for anything else."""
    if isinstance(weights, tuple) or not (path := as_path(weights)).is_dir():
        return {}
    # A folder of transformers or timm is no run.
    return {} if not is_bucket(path) and find_weights(Path(path)) else load_ranges(weights)


def _check_flags(format: str, quantize: str, *, calibrated: bool, per_tensor: bool, float_ends: bool) -> None:  # noqa: A002
    if format == "stablehlo" and quantize != "none":
        raise ValueError(f"quantize {quantize} is for the formats tflite and onnx")
    if quantize == "int8" and not calibrated:
        raise ValueError(
            "quantize int8 needs calibration: a folder of images, or a config file for its training images"
        )
    if quantize != "int8" and (per_tensor or float_ends):
        raise ValueError("per_tensor and float_ends are for quantize int8")
    if float_ends and format != "tflite":
        raise ValueError("float_ends is for the format tflite; an int8 .onnx file has float32 ends")


def _read_batch(batch: int | str | None, format: str) -> int | None:  # noqa: A002
    if batch is None:
        return 1 if format == "tflite" else None
    if batch == "dynamic":
        return None
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; valid: 1 or more, or dynamic")
    return batch


def _make_network(job: _Job, images: Images, ranges: dict[str, np.ndarray], *, per_tensor: bool) -> Quantized:
    if job.quantize != "int8":
        return as_float(job.graph, read_weights(job.graph, job.variables))
    if ranges:
        return make_trained(job.graph, job.variables, ranges)
    weights = read_weights(job.graph, job.variables)
    return quantize_network(job.graph, weights, job.inputs(images.pixels), per_tensor=per_tensor)


def _write(job: _Job, network: Quantized) -> tuple[bytes, dict]:
    """Return the file and its contract."""
    text = make_contract(job.graph, job.card, batch=job.batch, quantize=job.quantize)
    if job.format == "stablehlo":
        from mobilenet_jax.exporting.stablehlo import write_stablehlo

        normalisation = (job.given.mean, job.given.std) if job.preprocess else None
        size = job.given.image_size
        data = write_stablehlo(job.model, job.variables, image_size=size, batch=job.batch, normalisation=normalisation)
        return data, {**json.loads(text), "sha256": hashlib.sha256(data).hexdigest()}
    data = seal(_write_tflite(job, network, text) if job.format == "tflite" else _write_onnx(job, network, text))
    return data, read_contract(data)


def _write_tflite(job: _Job, network: Quantized, contract: str) -> bytes:
    from mobilenet_jax.exporting import tflite_metadata
    from mobilenet_jax.exporting.tflite import write_tflite

    names = job.card["class_names"]
    metadata = tflite_metadata.pack_metadata(
        name=job.card["name"],
        description=f"{job.card['model']}, width {job.card['width']:g}, exported by mobilenet_jax",
        mean=job.given.mean,
        std=job.given.std,
        takes_pixels=job.preprocess,
        has_labels=names is not None,
    )
    data = write_tflite(
        network,
        batch=job.batch,
        float16=job.quantize == "float16",
        float_ends=job.float_ends,
        metadata={tflite_metadata.NAME: metadata, KEY: contract.encode()},
    )
    return tflite_metadata.append_files(data, {tflite_metadata.LABELS: "\n".join(names)}) if names else data


def _write_onnx(job: _Job, network: Quantized, contract: str) -> bytes:
    from mobilenet_jax.exporting.onnx import write_onnx

    names = job.card["class_names"]
    labels = {"class_names": json.dumps(names)} if names else {}
    return write_onnx(network, batch=job.batch, float16=job.quantize == "float16", metadata={KEY: contract, **labels})


def _compare(job: _Job, network: Quantized, data: bytes, images: Images) -> dict[str, Any]:
    """Return the report's figures; raise ParityError if the file does not compute what it should."""
    batch = job.batch or 1
    count = -(-_COMPARED // batch) * batch
    pixels = images.pixels[np.arange(count) % len(images.pixels)]  # again from the start if there are too few
    inputs = job.inputs(pixels)
    exact = job.model.clone(precision="highest")

    @jax.jit
    def answer(variables: dict, images: jax.Array) -> Any:
        return exact.apply(variables, normalise_images(images, job.given.mean, job.given.std), train=False)

    variables = jax.device_put(job.variables)
    ours = lambda part: np.asarray(answer(variables, part))  # noqa: E731
    parts = [slice(i, i + batch) for i in range(0, count, batch)]
    wanted = np.concatenate([ours(pixels[part]) for part in parts])
    load = RUNTIMES[job.format]
    runtimes = {threads: load(data, threads=threads) for threads in report.THREADS}
    runtime = runtimes[1]
    got = np.concatenate([runtime(inputs[part]) for part in parts])
    figures = report.compare_logits(got, wanted)
    rounded = report.compare_logits(got, _run_rounded(job, inputs, parts)) if job.quantize == "float16" else figures
    limit = math.inf if job.quantize == "int8" else report.LIMIT
    if not rounded["max_difference"] <= limit or not math.isfinite(figures["max_difference"]):
        raise ParityError(
            f"the .{job.format} file differs from the network by {rounded['max_difference']:.1e} of the largest logit, "
            f"more than {limit:g}; nothing was written"
        )
    latency = {}
    for threads, loaded in runtimes.items():
        pair = {job.format: (loaded, inputs[parts[0]]), "jax": (ours, pixels[parts[0]])}
        latency[f"{threads} thread{'s' if threads > 1 else ''}"] = report.measure_in_turns(pair)
    return {
        "images": {"count": min(count, len(images.pixels)), "source": images.source},
        **figures,
        **(_compare_simulation(network, inputs, got) if job.quantize == "int8" else {}),
        "bytes": len(data),
        "operations": runtime.operations,
        "delegates": runtime.delegates,
        "latency_ms": latency,
    }


def _compare_simulation(network: Quantized, inputs: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """Return the share of logits that are those of the simulation in JAX, and the largest difference in steps."""
    scale = network.tensors[network.graph.output]
    steps = np.rint(np.abs(got - decode(simulate(network, inputs), scale)) / np.float32(scale.scale))
    return {"simulation_equal": float((steps == 0).mean()), "simulation_steps": int(steps.max())}


def _run_rounded(job: _Job, inputs: np.ndarray, parts: list[slice]) -> np.ndarray:
    """Return the logits of the network whose kernels are rounded to float16."""
    rounded = {
        name: Weights(pair.kernel.astype(np.float16).astype(np.float32), pair.bias)
        for name, pair in read_weights(job.graph, job.variables).items()
    }

    @jax.jit
    def answer(weights: dict, images: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return run_graph(job.graph, weights, images)[job.graph.output]

    return np.concatenate([answer(rounded, jnp.asarray(inputs[part])) for part in parts])


def _save(job: _Job, data: bytes, contract: dict, figures: dict[str, Any], out: str | os.PathLike | None) -> dict:
    stem = re.sub(r"[^\w.-]+", "_", job.card["name"])
    kind = "" if job.quantize == "none" else f"_{job.quantize}"
    folder = as_path(out or f"exports/{stem}_{job.format}{kind}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{kind}.{job.format}"
    found = {
        "file": str(path),
        "format": job.format,
        "quantize": job.quantize,
        "weights": {"name": job.card["name"], **job.card["source"]},
        "input": contract["input"],
        **figures,
    }
    write_atomic(path, data)
    write_json_atomic(path.with_suffix(".json"), contract)
    write_json_atomic(folder / "report.json", found)
    return found
