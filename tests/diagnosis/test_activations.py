from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mobilenet_jax.diagnosis.activations import (
    PLATEAUS,
    capture,
    count_plateaus,
    measure_activations,
    needed_units,
    sum_moments,
)
from mobilenet_jax.diagnosis.weights import quantise_variables
from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.layers import ACTIVATIONS, normalise_images

SCALE: Any = {"mean": (127.5, 127.5, 127.5), "std": (127.5, 127.5, 127.5)}
SIZE = 16


def make_batches(count: int, size: int) -> list[dict[str, np.ndarray]]:
    """Make batches of `size` from `count` random images, which are always the same; white fills the last batch."""
    images = np.random.default_rng(1).integers(256, size=(count, SIZE, SIZE, 3), dtype=np.uint8)
    padded = np.concatenate([images, np.full((-count % size, SIZE, SIZE, 3), 255, np.uint8)])
    mask = np.arange(len(padded)) < count
    return [{"images": padded[i : i + size], "mask": mask[i : i + size]} for i in range(0, len(padded), size)]


def plant(variables: dict, **leaves) -> dict:
    """Replace leaves of the variables: `params__stem__norm__bias=function of the old value`."""
    flat = traverse_util.flatten_dict(variables, sep="__")
    return traverse_util.unflatten_dict({**flat, **{path: f(flat[path]) for path, f in leaves.items()}}, sep="__")


def set_at(index, value):
    def change(array):
        array = np.array(array)
        array[index] = value
        return array

    return change


def run(network, variables=None, *, count: int = 6, size: int = 6, quantised=None):
    model, fresh = network
    variables = variables or fresh
    tally = measure_activations(model, variables, make_batches(count, size), quantised=quantised or {}, **SCALE)
    return tally.summarise({layer.path: layer.op for layer in list_layers(model.spec, variables)})


@pytest.fixture(scope="module")
def fresh(tiny):
    return run(tiny)


# Parts.


def test_plateaus_are_where_activations_are_flat():
    inputs = jnp.linspace(-8, 8, 1601)
    for name, (floor, ceiling) in PLATEAUS.items():
        slopes = jax.vmap(jax.grad(ACTIVATIONS[name]))(inputs)
        outputs = ACTIVATIONS[name](inputs)
        flat = (outputs == floor) | (outputs >= ceiling)
        # Except at kinks, and at the zero and the minimum of h-swish.
        differ = np.asarray(inputs)[np.asarray(flat != (slopes == 0))]
        assert set(np.round(differ, 2)) <= {0, 6, -3, -1.5}
        assert np.asarray(flat).sum() > 200


def test_units_on_plateaus_are_counted_exactly_and_padding_is_not():
    output = np.full((2, 1, 3, 4), 2.0, np.float32)
    output[0, 0, 0] = [0, 0, 6, 2]  # one active
    output[0, 0, 1] = [0, 1, 1, 1]  # three
    output[0, 0, 2] = [0, 6, 6, 6]  # none
    output[1] = 0  # padding, not an image
    mask = jnp.array([True, False])
    found = {k: np.asarray(v).tolist() for k, v in count_plateaus(jnp.array(output), mask, "relu6", 3).items()}
    assert found == {
        "pixels": 3,
        "floor": [3, 1, 0, 0],
        "ceiling": [0, 1, 2, 1],
        "active": 4,
        "fewest": 0,
        "lost": 2,
    }
    relu = count_plateaus(jnp.array(output), mask, "relu", None)
    assert np.asarray(relu["ceiling"]).tolist() == [0, 0, 0, 0]
    assert "lost" not in relu


def test_needed_units_are_the_smaller_side_of_a_1x1_convolution(tiny):
    model, variables = tiny
    needed = {layer.path: needed_units(layer.op) for layer in list_layers(model.spec, variables)}
    assert needed["block_01/expand"] == 8
    assert needed["block_01/project"] == 12
    assert needed["block_02/pointwise"] == 12
    assert needed["stem"] is needed["block_01/depthwise"] is needed["classifier"] is None


def test_moments_leave_padding_out():
    rng = np.random.default_rng(0)
    output = rng.standard_normal((3, 2, 2, 5)).astype(np.float32) + 50
    count, mean, scatter = sum_moments(jnp.array(output), jnp.array([True, False, True]))
    pixels = output[[0, 2]].reshape(-1, 5).astype(np.float64)
    assert count == 8
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(scatter, np.cov(pixels.T, bias=True) * 8, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu6", "hard_swish"])
def test_captured_outputs_are_equal_in_both_lowerings(make_tiny, activation):
    images = normalise_images(jnp.array(make_batches(2, 2)[0]["images"]), **SCALE)
    results = []
    for lowering in ("auto", "plain"):
        model, variables = make_tiny(activation, lowering=lowering)
        logits, outputs, blocks = jax.jit(capture, static_argnums=0)(model, variables, images)
        np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, images), rtol=1e-4, atol=1e-5)
        results.append((outputs, blocks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    outputs, blocks = results[0]
    assert set(blocks) == {"block_00", "block_01", "block_02"}
    assert len(outputs) == 1 + 2 + 2 + 2  # the projections are linear
    np.testing.assert_array_equal(blocks["block_02"], outputs["block_02/pointwise"])


def test_gelu_has_no_plateau(make_tiny):
    layers, bottlenecks, _ = run(make_tiny("gelu"))
    assert layers == {}
    assert len(bottlenecks) == 3


# The whole: planted faults are found.


def test_planted_saturation_and_dead_channels_are_found(tiny, fresh):
    _, variables = tiny
    bias = "params__block_00__expand__norm__bias"
    assert not any(layer["dead_channels"] or layer["saturated_channels"] for layer in fresh[0].values())
    planted = plant(variables, **{bias: lambda b: set_at(4, -100)(set_at(2, 100)(b))})
    layers, *_ = run(tiny, planted)
    found = layers["block_00/expand"]
    assert found["saturated_channels"] == [2]
    assert found["dead_channels"] == [4]
    assert found["floor_share"] >= 1 / 24
    assert found["ceiling_share"] >= 1 / 24
    # The layer in front of the planted one has not changed.
    assert layers["stem"] == fresh[0]["stem"]


def test_h_swish_is_dead_below_minus_3_and_has_no_ceiling(make_tiny):
    network = make_tiny("hard_swish")
    planted = plant(network[1], params__block_00__expand__norm__bias=set_at([1, 2], [-100, 100]))
    found = run(network, planted)[0]["block_00/expand"]
    assert found["dead_channels"] == [1]
    assert found["ceiling_share"] is None
    assert found["saturated_channels"] == []


def test_pixels_are_lost_where_units_are_fewer_than_dimensions(tiny, fresh):
    _, variables = tiny
    # 25 of 32 units are switched off, so at most 7 are left for the 8 dimensions of the input.
    planted = plant(variables, params__block_01__expand__norm__bias=set_at(slice(25), -100))
    units = run(tiny, planted)[0]["block_01/expand"]["active_units"]
    assert units["needed"] == 8
    assert units["lost_pixels"] == 1
    assert 0 <= units["fewest"] <= units["mean"] <= 7
    before = fresh[0]["block_01/expand"]["active_units"]
    assert before["lost_pixels"] < 0.5
    assert before["mean"] == pytest.approx(16, abs=4)  # half of the units


def test_a_projection_with_an_activation_loses_pixels_that_a_linear_one_keeps(make_tiny, fresh):
    layers, *_ = run(make_tiny(projection_activation="relu6"))
    assert layers["block_01/project"]["active_units"]["lost_pixels"] > 0.9  # all 12 of 12 are rarely active
    assert "block_01/project" not in fresh[0]


def test_a_bottleneck_of_rank_2_has_rank_2(tiny, fresh):
    _, variables = tiny

    def cut(kernel):
        u, s, v = np.linalg.svd(kernel[0, 0], full_matrices=False)
        s[2:] = 0
        return ((u * s) @ v)[None, None].astype(np.float32)

    cut_ranks = run(tiny, plant(variables, params__block_01__project__conv__kernel=cut))[1]
    before, after = ({found["row"]: found for found in ranks} for ranks in (fresh[1], cut_ranks))
    found = after["block_01"]
    assert found["channels"] == 12
    assert 1 < found["participation_ratio"] <= found["effective_rank"] <= 2 + 1e-6
    assert before["block_01"]["effective_rank"] > 3
    assert after["block_00"] == before["block_00"]


def test_batches_of_any_size_say_the_same(tiny):
    whole, parts = run(tiny, count=5, size=5), run(tiny, count=5, size=2)
    assert whole[0] == parts[0]
    for one, other in zip(whole[1], parts[1], strict=True):
        assert one.pop("row") == other.pop("row")
        assert one == pytest.approx(other, rel=1e-4)


def test_int8_answers_show_the_risk_that_was_built(tiny):
    model, variables = tiny
    variables = plant(
        variables,
        params__block_00__depthwise__norm__scale=set_at(3, 300),
        # Nothing reads the large channel; it only makes the steps of the other channels larger.
        params__block_00__project__conv__kernel=set_at((0, 0, 3), 0),
        params__classifier__kernel=lambda kernel: 100 * kernel,
    )
    kinds = {"per_tensor": False, "per_channel": True}
    quantised = {k: quantise_variables(model.spec, variables, per_channel=v) for k, v in kinds.items()}
    *_, answers = run(tiny, variables, quantised=quantised)
    assert answers is not None
    assert answers["per_channel"]["kl"] < 0.1 * answers["per_tensor"]["kl"]
    assert answers["per_channel"]["agreement"] >= answers["per_tensor"]["agreement"]
    *_, same = run(tiny, variables, quantised={"none": variables}, count=5, size=2)
    assert same == {"none": {"agreement": 1.0, "kl": pytest.approx(0, abs=1e-9)}}
