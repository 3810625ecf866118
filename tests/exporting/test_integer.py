"""The simulation of an int8 network gives LiteRT's answers to the bit."""

from dataclasses import replace

import numpy as np
import pytest

from mobilenet_jax.exporting.folding import Weights, read_weights
from mobilenet_jax.exporting.graph import (
    IMAGES,
    Activate,
    Add,
    AveragePairs,
    Conv,
    Dense,
    Graph,
    Mean,
    Multiply,
    Source,
    build_graph,
    with_normalisation,
)
from mobilenet_jax.exporting.integer import encode, make_quantized, simulate
from mobilenet_jax.exporting.quantized import Quantized, Scale
from mobilenet_jax.models.zoo import make_spec
from tests.exporting.int8 import measure_extremes, run_litert
from tests.exporting.networks import SIZE, SPECS, draw_variables

NAMES = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small_minimalistic")
SMALL = {name: make_spec(name, width=0.1, num_classes=10, shallow=True) for name in NAMES}
INPUTS = np.random.default_rng(0).normal(size=(16, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize("name", ["gates", "attention", *SMALL])
def test_every_output_is_equal_to_litert_to_the_bit(name):
    """Of networks of hard-swish, gates and float attention too."""
    spec = {**SPECS, **SMALL}[name]
    graph, variables = build_graph(spec, SIZE), draw_variables(spec)
    weights = read_weights(graph, variables)
    network = make_quantized(graph, weights, measure_extremes(graph, weights, INPUTS[:8]))
    codes = simulate(network, INPUTS)
    assert codes.std() > 20  # the answers are not a constant, nor all saturated
    np.testing.assert_array_equal(codes, run_litert(network, INPUTS))


def make_network(kind: str, rng: np.random.Generator, *, ties: bool) -> Quantized:
    """A graph of one node, or of a layer and a node, with scales and zero points at random.

    With `ties`, scales are powers of 2, so many results lie halfway between two codes.
    """
    shape, first = (8, 8, 16), (IMAGES,)

    def draw(low: float, high: float) -> Scale:
        power = rng.uniform(np.log2(low), np.log2(high))
        power = np.round(power) if ties else power
        return Scale(float(np.float32(2**power)), int(rng.integers(-128, 128)))

    given = draw(0.01, 0.2)
    copy = Conv(name="copy", inputs=first, shape=shape, kernel_shape=(1, 1, 1, 16), groups=16, source=Source())
    nodes = {
        "mean": [Mean(name="y", inputs=first, shape=(16,))],
        "hard_swish": [Activate(name="y", inputs=first, shape=shape, function="hard_swish")],
        "sigmoid": [Activate(name="y", inputs=first, shape=shape, function="sigmoid")],
        "gelu": [Activate(name="y", inputs=first, shape=shape, function="gelu")],
        "average": [AveragePairs(name="y", inputs=first, shape=(4, 4, 16))],
        "add": [copy, Add(name="y", inputs=(IMAGES, "copy"), shape=shape, activation="relu6")],
        "multiply": [copy, Multiply(name="y", inputs=(IMAGES, "copy"), shape=shape)],
    }[kind]
    graph = Graph(name=kind, input=IMAGES, input_shape=shape, nodes=tuple(nodes))
    kernel = np.full((1, 1, 1, 16), 127 / 128, np.float32) if ties else rng.normal(size=(1, 1, 1, 16))
    weights = {"copy": Weights(kernel.astype(np.float32), np.zeros(16, np.float32))}
    ranges = {name: np.zeros(2, np.float32) for name in (IMAGES, "copy", "y")}
    network = make_quantized(graph, weights, ranges)
    if kind == "average":
        tensors = {IMAGES: given, "y": given}
    elif kind == "sigmoid":
        tensors = {IMAGES: given, "y": network.tensors["y"]}
    else:
        tensors = {IMAGES: given, "copy": draw(0.01, 0.2), "y": draw(given.scale / 4, given.scale * 2)}
    layers = {}
    for name, layer in network.layers.items():
        unit = np.float32(given.scale) * layer.kernel_scale
        layers[name] = type(layer)(
            kernel=layer.kernel,
            kernel_scale=layer.kernel_scale,
            bias=rng.integers(-2000, 2000, 16, dtype=np.int32),
            bias_scale=unit,
        )
    return Quantized(graph=graph, tensors=tensors, layers=layers)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["mean", "hard_swish", "sigmoid", "gelu", "average", "add", "multiply"])
def test_every_kernel_rounds_as_litert_does(kind, ties):
    """At scales and zero points that no network would choose, too."""
    rng = np.random.default_rng(3)
    for _ in range(8):
        network = make_network(kind, rng, ties=ties)
        scale = network.tensors[IMAGES]
        numbers = (rng.integers(-128, 128, (4, 8, 8, 16)) - scale.zero_point) * np.float32(scale.scale)
        np.testing.assert_array_equal(simulate(network, numbers), run_litert(network, numbers))


@pytest.mark.parametrize("size", [1, 3])
def test_sums_beyond_the_integers_of_float32_are_exact(size):
    """Sums of 2**24 and more, where float32 holds every second integer, of the largest weights and codes."""
    channels, rng = 1400 // size**2, np.random.default_rng(0)
    kernel_shape = (size, size, channels, 8)
    conv = Conv(name="y", inputs=(IMAGES,), shape=(1, 1, 8), kernel_shape=kernel_shape, source=Source())
    graph = Graph(name="large", input=IMAGES, input_shape=(size, size, channels), nodes=(conv,))
    signs = np.where(rng.random(kernel_shape) < 0.9, 1, 0.99).astype(np.float32)
    weights = {"y": Weights(signs, np.linspace(-1, 1, 8).astype(np.float32))}
    high = 255 * size**2 * channels
    ranges = {name: np.array(ends, np.float32) for name, ends in ((IMAGES, (0, 255)), ("y", (high - 255, high)))}
    network = make_quantized(graph, weights, ranges)
    numbers = rng.integers(250, 256, (64, size, size, channels)).astype(np.float32)
    sums = np.abs(np.einsum("bhwi,hwio->bo", numbers, network.layers["y"].kernel.astype(np.float64)))
    assert sums.min() > 2**24
    np.testing.assert_array_equal(simulate(network, numbers), run_litert(network, numbers))


def test_one_scale_for_all_filters_is_litert_s_too():
    dense = Dense(name="y", inputs=("x",), shape=(5,), kernel_shape=(16, 5), source=Source())
    graph = Graph(
        name="dense", input=IMAGES, input_shape=(4, 4, 16), nodes=(Mean(name="x", inputs=(IMAGES,), shape=(16,)), dense)
    )
    rng = np.random.default_rng(0)
    weights = {"y": Weights(rng.normal(size=(16, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32))}
    ranges = {name: np.array([-3, 3], np.float32) for name in (IMAGES, "x", "y")}
    network = make_quantized(graph, weights, ranges, per_tensor=True)
    assert network.layers["y"].kernel_scale.shape == (1,)
    assert np.abs(network.layers["y"].kernel).max(axis=0).min() < 127  # of a scale for each filter, all would be 127
    numbers = rng.normal(size=(20, 4, 4, 16)).astype(np.float32)
    np.testing.assert_array_equal(simulate(network, numbers), run_litert(network, numbers))


@pytest.mark.parametrize("inside", [False, True])
def test_grey_levels_keep_codes_of_their_own(inside):
    """Normalised to -1 ... 1, outside of the file or inside, 256 levels have 255 codes: the two around 0 share one."""
    mean = Mean(name="y", inputs=(IMAGES,), shape=(3,))
    graph = Graph(name="levels", input=IMAGES, input_shape=(1, 1, 3), nodes=(mean,))
    if inside:
        graph = with_normalisation(graph, (127.5,) * 3, (127.5,) * 3)
    wide = np.array([-1, 1], np.float32)
    network = make_quantized(graph, read_weights(graph, {}), {IMAGES: wide, "y": wide})
    images = network.tensors[IMAGES]
    network = replace(network, tensors={**network.tensors, "y": images})  # so that the mean hides no code
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 1, 3)
    inputs = pixels if inside else (pixels - np.float32(127.5)) / np.float32(127.5)
    codes = simulate(network, inputs)
    assert [len(set(channel)) for channel in codes.T.tolist()] == [255] * 3
    numbers = network.tensors["y"].scale * (codes.astype(np.float32) - network.tensors["y"].zero_point)
    np.testing.assert_allclose(numbers, (pixels[:, 0, 0] - 127.5) / 127.5, atol=0.51 * network.tensors["y"].scale)


def test_codes_saturate_and_are_rounded_half_to_even():
    got = encode(np.array([-9.0, 0.25, 0.75, 9.0]), Scale(0.5, 100))
    assert got.tolist() == [82, 100, 102, 118]
    assert encode(np.array([1e9, -1e9]), Scale(0.5, 100)).tolist() == [127, -128]
