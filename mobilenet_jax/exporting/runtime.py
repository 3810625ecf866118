"""Exported files run by their own runtimes: LiteRT, ONNX Runtime and JAX."""

import contextlib
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from mobilenet_jax.exporting.contract import Exported
from mobilenet_jax.exporting.graph import PIXELS
from mobilenet_jax.weights import WeightsError

Levels = tuple[float, ...]  # grey levels of the channels
INSTALL = 'pip install -c constraints.txt -e ".[export]"'


class MissingPackageError(ValueError):
    """A package of the extra `export` is not installed; the message is one sentence with the command."""


class Runtime(Protocol):
    """A file that a runtime has loaded."""

    operations: dict[str, int]  # the number of operations of each type
    delegates: int | None  # partitions that an accelerating library took over; None: the runtime has no such thing

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits float32 [B, K] of images [B, H, W, C], float32 or uint8."""
        ...


def load_package(name: str, *, what: str, package: str) -> ModuleType:
    """Import a module of the extra `export`; raise MissingPackageError if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{what} needs the package {package}; install it: {INSTALL}") from error


class TFLiteRuntime:
    """A .tflite file in LiteRT."""

    def __init__(self, data: bytes, *, threads: int = 1):
        module = load_package("ai_edge_litert.interpreter", what="a .tflite file", package="ai-edge-litert")
        with _without_stderr():  # LiteRT prints that it uses XNNPACK
            self._interpreter = module.Interpreter(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
        (self._given,), (self._returned,) = (
            self._interpreter.get_input_details(),
            self._interpreter.get_output_details(),
        )
        self._batch: int = self._given["shape"][0]
        self._any_batch = self._given["shape_signature"][0] == -1
        counts = Counter(operation["op_name"] for operation in self._interpreter._get_ops_details())
        self.delegates: int | None = counts.pop("DELEGATE", 0)
        self.operations = dict(counts)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits; int8 codes are converted at both ends."""
        images = _encode(images, self._given)
        if self._any_batch and len(images) != self._batch:
            self._interpreter.resize_tensor_input(self._given["index"], images.shape, strict=True)
            self._interpreter.allocate_tensors()
            self._batch = len(images)
        return _decode(_in_batches(self._run, images, self._batch), self._returned)

    def _run(self, images: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._given["index"], images)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._returned["index"])


class OnnxRuntime:
    """An .onnx file in ONNX Runtime."""

    def __init__(self, data: bytes, *, threads: int = 1):
        module = load_package("onnxruntime", what="an .onnx file", package="onnxruntime")
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        # Without VNNI, int8 sums of 16 bits would saturate; this takes slower instructions that are exact.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = module.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        (given,) = self._session.get_inputs()
        self._name, self._is_pixels = given.name, given.type == "tensor(uint8)"
        self._batch = given.shape[0] if isinstance(given.shape[0], int) else None
        self.delegates: int | None = None
        self.operations = _count_onnx(data)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits."""
        images = images.astype(np.uint8 if self._is_pixels else np.float32, copy=False)
        return _in_batches(
            lambda part: self._session.run(None, {self._name: part})[0], images, self._batch or len(images)
        )


class StableHloRuntime:
    """A file of `jax.export` in JAX."""

    def __init__(self, data: bytes, *, threads: int = 1):
        import jax
        import jax.export

        del threads  # XLA uses all of them
        exported = jax.export.deserialize(bytearray(data))
        self._call, batch = jax.jit(exported.call), exported.in_avals[0].shape[0]
        self._batch = batch if isinstance(batch, int) else None
        self.delegates: int | None = None
        operations = Counter(re.findall(r'= "?stablehlo\.(\w+)', exported.mlir_module()))
        self.operations = dict(operations)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the logits."""
        return _in_batches(lambda part: np.asarray(self._call(part)), images, self._batch or len(images))


RUNTIMES: dict[str, Callable[..., Runtime]] = {
    "tflite": TFLiteRuntime,
    "onnx": OnnxRuntime,
    "stablehlo": StableHloRuntime,
}


def open_classifier(exported: Exported) -> Callable[[np.ndarray, Levels, Levels], np.ndarray]:
    """Return the function (images uint8 [B, H, W, C], mean, std) -> logits [B, K] of an exported file.

    A file that normalises inside is given the images, whatever mean and std are. The function uses all processors.
    Raises MissingPackageError, and WeightsError if the runtime refuses the file.
    """
    try:
        runtime = RUNTIMES[exported.kind](exported.data, threads=os.cpu_count() or 1)
    except MissingPackageError:
        raise
    except Exception as error:  # each runtime has its own kinds
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"the .{exported.kind} file of {exported.card['name']} cannot be run: {said}") from error

    if exported.contract["input"]["name"] == PIXELS:
        return lambda pixels, mean, std: runtime(pixels)

    def classify(pixels: np.ndarray, mean: Levels, std: Levels) -> np.ndarray:
        images = (pixels.astype(np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32)
        return runtime(images)

    return classify


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr; its errors are exceptions all the same."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def _count_onnx(data: bytes) -> dict[str, int]:
    onnx: Any = load_package("onnx", what="an .onnx file", package="onnx")
    return dict(Counter(node.op_type for node in onnx.load_from_string(data).graph.node))


def _in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch: int) -> np.ndarray:
    """Run images in batches of one size; the last is filled with zeros, whose answers are dropped."""
    outputs = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
        outputs.append(run(padded)[: len(part)])
    return np.concatenate(outputs)


def _encode(images: np.ndarray, details: dict) -> np.ndarray:
    """Return images in the type of a tensor of LiteRT."""
    if details["dtype"] is not np.int8:
        return images.astype(details["dtype"], copy=False)
    scale, zero_point = details["quantization"]
    codes = np.rint(images.astype(np.float32) * (np.float32(1) / np.float32(scale))) + zero_point
    return np.clip(codes, -128, 127).astype(np.int8)


def _decode(outputs: np.ndarray, details: dict) -> np.ndarray:
    if details["dtype"] is not np.int8:
        return outputs
    scale, zero_point = details["quantization"]
    return (outputs.astype(np.float32) - zero_point) * np.float32(scale)
