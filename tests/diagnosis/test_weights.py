import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from mobilenet_jax.diagnosis.measures import measure_int8
from mobilenet_jax.diagnosis.weights import measure_layer, quantise_variables
from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.dead_filters import count_dead_filters


@pytest.fixture
def network(tiny) -> tuple[Spec, dict]:
    """The tiny network's spec, and {path: leaf} to plant something in."""
    model, variables = tiny
    return model.spec, traverse_util.flatten_dict(jax.tree.map(np.copy, variables), sep="/")


def measure(spec: Spec, leaves: dict) -> dict[str, dict]:
    layers = list_layers(spec, traverse_util.unflatten_dict(leaves, sep="/"))
    return {layer.path: measure_layer(layer, spec.bn_epsilon) for layer in layers}


def test_planted_dead_filters_are_found_with_their_cause(network):
    spec, leaves = network
    assert all(layer["dead_filters"] == [] for layer in measure(spec, leaves).values())
    leaves["params/block_01/depthwise/conv/kernel"][..., 3] = 0
    leaves["params/block_01/depthwise/norm/scale"][5] = 1e-12
    leaves["params/block_01/depthwise/conv/kernel"][..., 7] *= 0.05  # neither is dead by itself
    leaves["params/block_01/depthwise/norm/scale"][7] *= 0.05
    layers = measure(spec, leaves)
    dead = layers.pop("block_01/depthwise")["dead_filters"]
    assert [(found["channel"], found["cause"]) for found in dead] == [(3, "kernel"), (5, "scale"), (7, "both")]
    assert dead[0]["relative_norm"] == 0
    assert dead[2]["relative_norm"] == pytest.approx(0.0025, rel=1)
    assert not any(layer["dead_filters"] for layer in layers.values())


def test_variances_below_epsilon_are_found(network):
    spec, leaves = network
    leaves["batch_stats/block_00/expand/norm/var"][2] = 1e-12
    found = measure(spec, leaves)
    norm = found.pop("block_00/expand")["norm"]
    assert norm["below_epsilon"] == [2]
    assert norm["smallest_variance"] == pytest.approx(1e-12)
    assert norm["smallest_shrink"] == pytest.approx((1e-12 / spec.bn_epsilon) ** 0.5, rel=1e-3)
    assert all(not layer["norm"]["below_epsilon"] for layer in found.values() if layer["norm"])
    assert found["classifier"]["norm"] is None


def test_the_batch_norm_makes_the_int8_risk(network):
    spec, leaves = network
    even = measure(spec, leaves)["block_00/depthwise"]["int8"]
    leaves["batch_stats/block_00/depthwise/norm/var"][4] = (
        1e-8  # the factor is 1 / sqrt of this plus an epsilon of 1e-3
    )
    leaves["params/block_00/depthwise/norm/scale"][4] = 100
    found = measure(spec, leaves)["block_00/depthwise"]["int8"]
    assert found["range_ratio"] > 1000
    assert found["lost_channels"] == [i for i in range(24) if i != 4]
    assert found["channel_sqnr_db"]["per_channel"] == pytest.approx(even["channel_sqnr_db"]["per_channel"], abs=1)


def test_a_kernel_of_rank_2_has_rank_2(network):
    spec, leaves = network
    kernel = leaves["params/block_01/project/conv/kernel"]
    basis, *_ = np.linalg.qr(np.random.default_rng(0).standard_normal((kernel.shape[-1], 2)))
    kernel[0, 0] = 0
    kernel[0, 0, :2] = basis.T  # two orthogonal directions of equal length
    found = measure(spec, leaves)
    assert found["block_01/project"]["kernel_rank"]["effective_rank"] == pytest.approx(2, rel=1e-4)
    assert found["block_01/project"]["kernel_rank"]["participation_ratio"] == pytest.approx(2, rel=1e-4)
    assert found["block_00/project"]["kernel_rank"]["effective_rank"] > 4
    assert found["block_01/depthwise"]["kernel_rank"] is None


def test_quantised_variables_are_on_the_grid_once_folded(network):
    spec, leaves = network
    leaves["params/block_00/project/norm/scale"][1] = 0
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    for kind, per_channel in (("per_tensor", False), ("per_channel", True)):
        quantised = quantise_variables(spec, variables, per_channel=per_channel)
        for before, after in zip(list_layers(spec, variables), list_layers(spec, quantised), strict=True):
            assert np.isfinite(after.kernel).all()
            assert not np.array_equal(after.kernel, before.kernel)
            # Weights on the grid of their own largest magnitude are not rounded again.
            again = measure_int8(after.kernel * after.factor)["sqnr_db"][kind]
            assert again > 100


def test_counts_under_jit_equal_the_counts_of_the_report(network):
    spec, leaves = network
    leaves["params/block_00/depthwise/conv/kernel"][..., :10] *= 1e-4
    leaves["params/block_01/depthwise/conv/kernel"][..., 0] = 0
    leaves["batch_stats/stem/norm/var"][:3] = 0
    found = measure(spec, leaves)
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    count = jax.jit(functools.partial(count_dead_filters, spec))
    counts = {k: (float(v), float(n)) for k, (v, n) in count(variables["params"], variables["batch_stats"]).items()}
    dead = [each for layer in found.values() if layer["kind"] == "depthwise" for each in layer["dead_filters"]]
    assert counts["dead_filters"] == (len(dead), 1) == (11, 1)
    assert counts["variances_below_epsilon"] == (3, 1)
    for limit in ("1e-4", "1e-3", "1e-2"):
        assert counts[f"filters_below_{limit}"][0] == sum(each["relative_norm"] < float(limit) for each in dead)
    assert 1 < counts["filters_below_1e-4"][0] < 11 == counts["filters_below_1e-1"][0]


def test_every_kernel_is_a_layer_with_attention_and_layer_scale_too():
    model = create_model("mobilenet_v4_hybrid_medium", num_classes=5)
    variables = init_variables(model, seed=0)
    found = {layer.path: layer for layer in list_layers(model.spec, variables)}
    kernels = {path for path in traverse_util.flatten_dict(variables["params"], sep="/") if path.endswith("kernel")}
    assert {f"{path}/{'kernel' if path == 'classifier' else 'conv/kernel'}" for path in found} == kernels
    attention = next(path for path in found if path.endswith("key/depthwise"))
    assert found[attention].kind == "depthwise"
    assert found[attention.replace("depthwise", "project")].scale is None
