"""TFLite files compute what the network computes, with the operations that a person would have drawn."""

from collections import Counter

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from mobilenet_jax.exporting.folding import read_weights
from mobilenet_jax.exporting.graph import build_graph, with_normalisation
from mobilenet_jax.exporting.quantized import as_float
from mobilenet_jax.exporting.tflite import write_tflite
from tests.exporting.networks import SIZE, SPECS


def run(data: bytes, images: np.ndarray) -> tuple[np.ndarray, Counter]:
    """The outputs of a file for images, and the numbers of its operations."""
    interpreter = Interpreter(model_content=data, num_threads=1)
    (given,), (returned,) = interpreter.get_input_details(), interpreter.get_output_details()
    if given["shape_signature"][0] == -1:
        interpreter.resize_tensor_input(given["index"], images.shape, strict=True)
    interpreter.allocate_tensors()
    outputs = []
    for part in np.split(images, len(images) // interpreter.get_input_details()[0]["shape"][0]):
        interpreter.set_tensor(given["index"], part)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(returned["index"]))
    return np.concatenate(outputs), Counter(op["op_name"] for op in interpreter._get_ops_details())


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest number."""
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in SPECS), ("attention", 3), ("attention", None)])
def test_a_float_file_computes_what_the_network_computes(networks, name, batch):
    spec, variables, images, logits = networks[name]
    graph = build_graph(spec, SIZE)
    got, operations = run(write_tflite(as_float(graph, read_weights(graph, variables)), batch=batch), images)
    assert difference(got, logits) < 2e-6
    assert operations["DELEGATE"] == 1


def test_kernels_in_float16_are_the_rounded_kernels_and_half_the_size(networks):
    spec, variables, images, _ = networks["gates"]
    graph = build_graph(spec, SIZE)
    weights = read_weights(graph, variables)
    rounded = {
        name: pair._replace(kernel=pair.kernel.astype(np.float16).astype(np.float32)) for name, pair in weights.items()
    }
    wide, narrow = write_tflite(as_float(graph, rounded)), write_tflite(as_float(graph, weights), float16=True)
    wanted, _ = run(wide, images)
    got, operations = run(narrow, images)
    assert difference(got, wanted) < 1e-6
    assert operations["DELEGATE"] == 1
    kernels = sum(pair.kernel.nbytes for pair in weights.values())
    assert len(wide) - len(narrow) > 0.25 * kernels


def test_pixels_are_normalised_inside_the_file(networks):
    spec, variables, _, _ = networks["gates"]
    mean, std = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    pixels = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    graph = build_graph(spec, SIZE)
    plain = as_float(graph, read_weights(graph, variables))
    wanted, _ = run(write_tflite(plain), ((pixels - np.array(mean)) / np.array(std)).astype(np.float32))
    graph = with_normalisation(graph, mean, std)
    got, operations = run(write_tflite(as_float(graph, read_weights(graph, variables))), pixels)
    assert difference(got, wanted) < 2e-6
    assert operations["DELEGATE"] == 1
