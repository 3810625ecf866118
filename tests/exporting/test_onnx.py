"""ONNX files compute what the network computes."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.export_table import draw_variables
from mobilenet_jax.exporting.folding import read_weights
from mobilenet_jax.exporting.graph import build_graph, with_normalisation
from mobilenet_jax.exporting.integer import decode, simulate
from mobilenet_jax.exporting.onnx import write_onnx
from mobilenet_jax.exporting.quantize import quantize
from mobilenet_jax.exporting.quantized import as_float
from mobilenet_jax.exporting.runtime import OnnxRuntime
from tests.exporting.networks import SIZE, SPECS


def run(data: bytes, images: np.ndarray) -> np.ndarray:
    """The outputs of a file for images."""
    session = onnxruntime.InferenceSession(data)
    (given,) = session.get_inputs()
    return np.asarray(session.run(None, {given.name: images})[0])


@pytest.mark.parametrize(("name", "batch"), [*((name, None) for name in SPECS), ("gates", 3)])
def test_a_float_file_computes_what_the_network_computes(networks, name, batch):
    spec, variables, images, logits = networks[name]
    graph = build_graph(spec, SIZE)
    data = write_onnx(as_float(graph, read_weights(graph, variables)), batch=batch, metadata={"key": "value"})
    np.testing.assert_allclose(run(data, images), logits, atol=2e-6 * np.abs(logits).max())
    model = onnx.load_from_string(data)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"key": "value"}
    side = model.graph.input[0].type.tensor_type.shape.dim[0]
    assert (side.dim_param or side.dim_value) == (batch or "batch")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Transpose"] == 1 + kinds["Softmax"]  # of the images, and of the key of each attention


def test_pixels_are_normalised_inside_the_file(networks):
    spec, variables, _, _ = networks["gates"]
    mean, std = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    pixels = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    graph = build_graph(spec, SIZE)
    plain = write_onnx(as_float(graph, read_weights(graph, variables)))
    wanted = run(plain, ((pixels - np.array(mean)) / np.array(std)).astype(np.float32))
    graph = with_normalisation(graph, mean, std)
    got = run(write_onnx(as_float(graph, read_weights(graph, variables)), float16=False), pixels)
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())


def test_an_int8_file_of_attention_and_antialiasing_is_near_the_simulation():
    spec = SPECS["attention"]
    graph = with_normalisation(build_graph(spec, SIZE), (110.0, 120.0, 130.0), (50.0, 60.0, 70.0))
    pixels = np.random.default_rng(0).integers(256, size=(8, SIZE, SIZE, 3), dtype=np.uint8)
    network = quantize(graph, read_weights(graph, draw_variables(spec)), pixels)
    scale = network.tensors[graph.output]
    steps = (OnnxRuntime(write_onnx(network))(pixels) - decode(simulate(network, pixels), scale)) / scale.scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)  # whole codes
    # ONNX Runtime rounds sums and means in another way than LiteRT, and attention spreads what differs.
    assert np.abs(steps).mean() < 2
    assert np.abs(steps).max() < 10
