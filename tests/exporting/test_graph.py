"""The graph computes what the network computes, and uses every variable once."""

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from benchmarks.export_table import draw_variables
from mobilenet_jax.exporting.folding import fold_weights, read_weights
from mobilenet_jax.exporting.graph import IMAGES, PIXELS, Graph, build_graph, with_normalisation
from mobilenet_jax.exporting.interpreter import run_graph
from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.options import with_output_stride
from mobilenet_jax.models.spec import Conv, Spec, UniversalInverted
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS, make_spec
from tests.exporting.networks import SIZE, SPECS


def list_variables(graph: Graph) -> list[str]:
    """The paths of the variables that the layers are made of."""
    found = []
    for layer in graph.layers():
        source = layer.source
        found += [f"params/{path}" for path in (source.kernel, source.bias, source.gamma) if path]
        if source.norm:
            found += [f"params/{source.norm}/{leaf}" for leaf in ("scale", "bias")]
            found += [f"batch_stats/{source.norm}/{leaf}" for leaf in ("mean", "var")]
    return found


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_variable_is_in_one_layer_and_layers_are_called_by_their_paths(name, convention):
    try:
        spec = make_spec(name, convention=convention)
    except ValueError:
        pytest.skip(f"{convention} has no {name}")
    graph = build_graph(spec, 224)
    assert Counter(list_variables(graph)) == Counter("/".join(path) for path in variable_shapes(spec))
    for layer in graph.layers():
        if kernel := layer.source.kernel:
            assert kernel.removesuffix("/kernel").removesuffix("/conv") == layer.name


@pytest.mark.parametrize("name", SPECS)
def test_the_graph_computes_what_the_network_computes(networks, name):
    spec, variables, images, logits = networks[name]
    graph = build_graph(spec, SIZE)
    weights = read_weights(graph, variables)
    values = jax.jit(lambda weights, images: run_graph(graph, weights, images))(weights, images)
    assert {name: x.shape[1:] for name, x in values.items()} == {name: graph.shape(name) for name in values}
    np.testing.assert_allclose(values[graph.output], logits, atol=2e-6 * np.abs(logits).max())


def test_pixels_are_normalised_by_the_first_layer(networks):
    spec, variables, images, _ = networks["shortcuts"]
    mean, std = (10.0, 20.0, 30.0), (50.0, 60.0, 70.0)
    graph = with_normalisation(build_graph(spec, SIZE), mean, std)
    assert (graph.input, graph.nodes[0].name, graph.shape(PIXELS)) == (PIXELS, IMAGES, (SIZE, SIZE, 3))
    pixels = np.random.default_rng(0).integers(256, size=images.shape, dtype=np.uint8)
    first = read_weights(graph, variables)[IMAGES]
    got = pixels * first.kernel + first.bias
    np.testing.assert_allclose(got, (pixels - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_variables_through_the_folding():
    row = UniversalInverted(filters=8, expanded=8, layer_scale=0.1)
    spec = Spec(name="one", stem=Conv(filters=8), blocks=(row,), head=None, num_classes=2)
    graph, variables = build_graph(spec, SIZE), draw_variables(spec)

    @jax.jit
    @jax.grad
    def differentiate(params):
        folded = fold_weights(graph, {**variables, "params": params})
        return sum((pair.kernel**2).sum() + (pair.bias**2).sum() for pair in folded.values())

    gradients: dict[str, Any] = traverse_util.flatten_dict(differentiate(variables["params"]), sep="/")
    assert [path for path, gradient in gradients.items() if not np.abs(gradient).max() > 0] == []


def test_a_graph_is_a_value():
    spec = make_spec("mobilenet_v4_hybrid_medium")
    assert hash(build_graph(spec, 224)) == hash(build_graph(spec, 224))
    assert build_graph(spec, 224) == build_graph(spec, (224, 224))
    assert build_graph(spec, 224) != build_graph(spec, 256)
    assert build_graph(with_output_stride(make_spec("mobilenet_v2"), 8), 224) != build_graph(
        make_spec("mobilenet_v2"), 224
    )


def test_an_image_that_is_too_small_is_refused():
    spec = make_spec("mobilenet_v1", convention="keras")
    with pytest.raises(ValueError, match="use a larger image_size"):
        build_graph(spec, 4)
