"""The methods of post-training quantization do what their papers say."""

from typing import Any

import jax
import numpy as np
import pytest

from mobilenet_jax.exporting import calibrate
from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import IMAGES, Conv, Graph, Mean, Source, build_graph
from mobilenet_jax.exporting.integer import simulate
from mobilenet_jax.exporting.interpreter import run_graph
from mobilenet_jax.exporting.quantize import correct_biases, equalize_layers, find_pairs, quantize
from mobilenet_jax.models.zoo import make_spec

SIZE = 8
IMAGES_8 = np.random.default_rng(0).normal(size=(20, SIZE, SIZE, 3)).astype(np.float32)


def make_chain(activation: str = "relu") -> tuple[Graph, dict[str, Weights]]:
    """Three convolutions whose channels have very different extents, and a mean."""
    rng = np.random.default_rng(1)

    def conv(name: str, source: str, shape: tuple[int, ...], **fields: Any) -> Conv:
        size = (SIZE, SIZE, shape[-1])
        return Conv(name=name, inputs=(source,), shape=size, kernel_shape=shape, source=Source(), **fields)  # pyright: ignore[reportArgumentType]

    nodes = (
        conv("a", IMAGES, (1, 1, 3, 8), activation=activation),
        conv("b", "a", (3, 3, 1, 8), groups=8, pads=((1, 1), (1, 1)), activation=activation),
        conv("c", "b", (1, 1, 8, 4)),
        Mean(name="y", inputs=("c",), shape=(4,)),
    )
    weights = {}
    for node in nodes[:3]:
        extents = np.exp(1.5 * rng.normal(size=node.kernel_shape[-1]))
        bias = rng.normal(size=node.kernel_shape[-1]).astype(np.float32)
        weights[node.name] = Weights((rng.normal(size=node.kernel_shape) * extents).astype(np.float32), bias)
    graph = Graph(name="chain", input=IMAGES, input_shape=(SIZE, SIZE, 3), nodes=nodes)
    return graph, weights


@pytest.fixture(scope="module")
def run():
    """(graph, weights) -> the output of the float network for IMAGES_8."""
    compiled = jax.jit(run_graph, static_argnums=0)
    return lambda graph, weights: np.asarray(compiled(graph, weights, IMAGES_8)[graph.output])


def extents(kernel: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(kernel).max(axis=tuple(i for i in range(4) if i != axis))


def test_equalisation_keeps_the_function_and_evens_the_channels(run):
    graph, weights = make_chain()
    changed, equal = equalize_layers(graph, weights)
    assert changed == graph
    np.testing.assert_allclose(run(graph, equal), run(graph, weights), rtol=1e-4, atol=1e-5)
    for first, second, axis in (("a", "b", 3), ("b", "c", 2)):
        np.testing.assert_allclose(extents(equal[first].kernel, 3), extents(equal[second].kernel, axis), rtol=1e-3)
    assert np.ptp(extents(equal["a"].kernel, 3)) < 0.9 * np.ptp(extents(weights["a"].kernel, 3))


def test_equalisation_turns_a_relu6_into_a_relu():
    graph, weights = make_chain("relu6")
    changed, _ = equalize_layers(graph, weights)
    assert [getattr(node, "activation", None) for node in changed.nodes] == ["relu", "relu", "linear", None]


def test_pairs_are_layers_with_one_reader():
    """Of V2: expansion and depthwise, depthwise and projection; a projection only where no sum reads it."""
    graph = build_graph(make_spec("mobilenet_v2"), 224)
    names = [(first.name, second.name) for first, second in find_pairs(graph)]
    assert ("block_01/expand", "block_01/depthwise") in names
    assert ("block_01/depthwise", "block_01/project") in names
    assert not any(first == "block_01/project" for first, _ in names)  # block_02 adds to it
    assert ("block_00/project", "block_01/expand") in names


def test_corrected_biases_cancel_the_mean_error_of_rounded_kernels(run):
    graph, weights = make_chain()
    rounded = {}
    corrected = correct_biases(graph, weights, IMAGES_8, per_tensor=True)
    for name, (kernel, _) in weights.items():
        scale = np.abs(kernel).max() / 127
        rounded[name] = (np.round(kernel / scale) * scale).astype(np.float32)
    # The last layer alone is rounded, so its inputs are those of the float network.
    plain, fixed = ({**weights, "c": Weights(rounded["c"], pair["c"].bias)} for pair in (weights, corrected))
    before, after = (np.abs((run(graph, w) - run(graph, weights)).mean(axis=0)) for w in (plain, fixed))
    assert before.max() > 1e-3
    assert after.max() < 1e-2 * before.max()


def test_percentiles_leave_out_an_outlier_and_the_least_error_weighs_it():
    counts = np.zeros(2048, np.int64)
    counts[1:1024] = 1000  # even from 0 to 5, and one value at 10
    counts[2047] = 1
    low, high = calibrate.METHODS["percentile"](counts, 0.0, 10.0)
    assert (low, high) == (pytest.approx(0, abs=0.01), pytest.approx(5, abs=0.01))
    low, high = calibrate.METHODS["mse"](counts, 0.0, 10.0)
    assert low == 0
    assert 5 <= high < 6
    counts[2047] = 50_000  # 5% at 10: saturating them costs more than a coarser step
    assert calibrate.METHODS["mse"](counts, 0.0, 10.0)[1] == pytest.approx(10, rel=0.1)


def test_ranges_cover_all_images_whatever_the_batch():
    graph, weights = make_chain()
    graph = Graph(name="a", input=IMAGES, input_shape=graph.input_shape, nodes=graph.nodes[:1])
    ranges = calibrate.measure_ranges(graph, weights, IMAGES_8)
    assert ranges[IMAGES].tolist() == [IMAGES_8.min(), IMAGES_8.max()]
    got = np.maximum(np.einsum("nhwi,io->nhwo", IMAGES_8, weights["a"].kernel[0, 0]) + weights["a"].bias, 0)
    np.testing.assert_allclose(ranges["a"], [got.min(), got.max()], rtol=1e-5)


def test_bad_calibration_is_refused():
    graph, weights = make_chain()
    with pytest.raises(ValueError, match="ranges is 'max'; valid: minmax, percentile, mse"):
        quantize(graph, weights, IMAGES_8, ranges="max")
    with pytest.raises(ValueError, match=r"calibration images are \(0, 8, 8, 3\); valid: \[1 or more"):
        quantize(graph, weights, IMAGES_8[:0])


def test_each_method_brings_int8_closer_to_float_where_it_applies(run):
    """One scale for a kernel is worst; a scale for each filter or equalised channels are better."""
    graph, weights = make_chain()
    wanted = run(graph, weights)

    def error(**options: Any) -> float:
        network = quantize(graph, weights, IMAGES_8, **{"ranges": "minmax", "correct_bias": False, **options})
        scale, zero = network.tensors[graph.output]
        return float(np.sqrt(np.mean((scale * (simulate(network, IMAGES_8).astype(np.float32) - zero) - wanted) ** 2)))

    worst = error(per_tensor=True)
    assert error() < 0.7 * worst
    assert error(per_tensor=True, equalize=True) < 0.8 * worst
    assert error(per_tensor=True, correct_bias=True) < 0.9 * worst


def test_equalisation_leaves_the_weights_it_is_given_alone():
    graph, weights = make_chain()
    before = {name: pair.kernel.copy() for name, pair in weights.items()}
    equalize_layers(graph, weights)
    assert all(np.array_equal(weights[name].kernel, kernel) for name, kernel in before.items())


def test_logits_above_those_of_the_calibration_are_no_draw(run):
    graph, weights = make_chain()
    largest = np.argmax(run(graph, weights).max(axis=1))
    network = quantize(graph, weights, np.delete(IMAGES_8, largest, axis=0))
    codes = simulate(network, IMAGES_8)
    assert codes[largest].max() == codes.max() < 127


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_no_method_cuts_the_logits_or_the_images(method):
    graph, weights = make_chain()
    extremes = calibrate.measure_ranges(graph, weights, IMAGES_8)
    found = calibrate.measure_ranges(graph, weights, IMAGES_8, method=method)
    for name in (IMAGES, graph.output):
        assert np.array_equal(found[name], extremes[name])
    assert all(np.ptp(found[name]) <= np.ptp(extremes[name]) for name in extremes)
