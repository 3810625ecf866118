"""Our own exported files in the runtimes of devices: LiteRT with XNNPACK, and ONNX Runtime. Inference only."""

import importlib
import time

from benchmarks.speed.workers.protocol import Run, UnsupportedError, serve

_PACKAGES = {"litert": "ai_edge_litert", "onnx": "onnxruntime"}


def load(case: dict) -> tuple[Run, dict]:
    """Export the network in float32 with batch norm folded, and load the file and one batch, which every step uses."""
    runtime = importlib.import_module(_PACKAGES[case["side"]])  # before anything slow: it may not be installed
    if case["devices"] > 1:
        raise UnsupportedError("runs on one device")
    import numpy as np

    from mobilenet_jax.exporting.folding import read_weights
    from mobilenet_jax.exporting.graph import build_graph
    from mobilenet_jax.exporting.onnx import write_onnx
    from mobilenet_jax.exporting.quantized import as_float
    from mobilenet_jax.exporting.runtime import OnnxRuntime, TFLiteRuntime
    from mobilenet_jax.exporting.tflite import write_tflite
    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.models.network import create_model

    size, count = case["resolution"], case["batch_size"]
    model = create_model(case["name"], width=case["width"], **case["options"])
    graph = build_graph(model.spec, size)
    network = as_float(graph, read_weights(graph, init_variables(model, seed=0)))
    if case["side"] == "litert":
        file = TFLiteRuntime(write_tflite(network, batch=count), threads=case["threads"])
    else:
        file = OnnxRuntime(write_onnx(network, batch=count), threads=case["threads"])
    images = np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)

    def infer(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            file(images)
        return time.perf_counter() - start

    return infer, {"versions": {_PACKAGES[case["side"]]: runtime.__version__}}


if __name__ == "__main__":
    serve(load)
