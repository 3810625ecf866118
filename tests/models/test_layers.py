"""Each layer in its fast form against its textbook form, and against its formula."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.models import spec as specs
from mobilenet_jax.models.activations import ACTIVATIONS, GATES
from mobilenet_jax.models.layers import (
    ANTIALIASES,
    Conv,
    ConvNorm,
    Dense,
    Layers,
    Norm,
    PlainNorm,
    SqueezeExcite,
    drop_path,
    spatial_mean,
)
from mobilenet_jax.models.ops import ConvOp, DepthwiseOp, SqueezeExciteOp
from mobilenet_jax.models.zoo import make_spec

SPEC = make_spec("mobilenet_v2")


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _apply(layer, variables, x, **kwargs) -> Any:
    return jax.jit(functools.partial(layer.apply, **kwargs))(variables, x)


def test_every_valid_value_has_its_function_and_no_other():
    assert tuple(ACTIVATIONS) == specs.ACTIVATIONS
    assert tuple(GATES) == specs.SE_GATES
    assert ("", *ANTIALIASES) == specs.ANTIALIASES


def test_trap_06_activations_saturate_where_they_should():
    x = jnp.array([-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 7.0])
    np.testing.assert_array_equal(ACTIVATIONS["linear"](x), x)
    np.testing.assert_array_equal(ACTIVATIONS["relu"](x), [0, 0, 0, 0, 1, 3, 6, 7])
    np.testing.assert_array_equal(ACTIVATIONS["relu6"](x), [0, 0, 0, 0, 1, 3, 6, 6])
    np.testing.assert_allclose(ACTIVATIONS["hard_swish"](x), [0, 0, -1 / 3, 0, 2 / 3, 3, 6, 7], rtol=1e-6)
    # x times the normal distribution function; the approximation by tanh gives 0.8412 at 1.
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, rtol=1e-5, atol=1e-6)


def test_trap_08_hard_sigmoid_is_relu6_over_six():
    x = jnp.array([-3.5, -3.0, -1.0, 0.0, 1.0, 2.5, 3.0, 4.0])
    expected = [0, 0, 1 / 3, 0.5, 2 / 3, 5.5 / 6, 1, 1]  # 0.2 x + 0.5 has 0.3 at -1 and 1 at 2.5
    np.testing.assert_allclose(GATES["hard_sigmoid"](x), expected, rtol=1e-6)
    np.testing.assert_allclose(GATES["sigmoid"](x), [1 / (1 + math.exp(-v)) for v in x], rtol=1e-5)
    np.testing.assert_allclose(GATES["hard_swish"](x), np.array(x) * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_trap_08_squeeze_excite_is_reduce_relu_expand_gate(gate):
    dense = functools.partial(Dense, spec=SPEC, dtype=jnp.float32)
    op = SqueezeExciteOp(name="se", in_channels=8, filters=8, reduced=3, gate=gate)
    layer = SqueezeExcite(op, Layers(Conv, Norm, dense))
    x = _normal(2, 5, 4, 8)
    params = {
        "reduce": {"kernel": 2 * _normal(8, 3), "bias": _normal(3, seed=1)},
        "expand": {"kernel": 2 * _normal(3, 8, seed=2), "bias": _normal(8, seed=3)},
    }
    hidden = np.maximum(x.mean((1, 2)) @ params["reduce"]["kernel"] + params["reduce"]["bias"], 0)
    z = hidden @ params["expand"]["kernel"] + params["expand"]["bias"]
    sigmoid = 1 / (1 + np.exp(-z)) if gate == "sigmoid" else np.clip(z + 3, 0, 6) / 6
    gates = z * sigmoid if gate == "hard_swish" else sigmoid
    found = _apply(layer, {"params": params}, x)
    np.testing.assert_allclose(found, x * gates[:, None, None, :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_is_batch_norm_in_float32(activation):
    """Outputs, statistics and gradients in training agree to 1e-5 of the largest value."""
    variables = {
        "params": {"scale": 1 + 0.3 * _normal(6), "bias": _normal(6, seed=1)},
        "batch_stats": {"mean": _normal(6, seed=2), "var": 1 + _normal(6, seed=3) ** 2},
    }
    x, cotangent = 2 * _normal(3, 5, 4, 6, seed=4) + 1, _normal(3, 5, 4, 6, seed=5)
    results = []
    for layer, mode in (
        (Norm(activation, 6, SPEC), {}),
        (PlainNorm(activation, 6, SPEC), {"use_running_average": False}),
    ):

        def run(params, x, layer=layer, mode=mode):
            full = {**variables, "params": params}
            y, updates = layer.apply(full, x, **mode, mutable=["batch_stats"])
            return jnp.sum(y * cotangent), (y, updates["batch_stats"])

        gradients, (y, stats) = jax.grad(run, argnums=(0, 1), has_aux=True)(variables["params"], x)
        results.append((y, stats, gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max())),
        *results,
    )


def test_trap_19_bn_decay_is_the_share_kept():
    x = _normal(4, 3, 3, 2)
    layer = Norm("linear", 2, make_spec("mobilenet_v2", bn_decay=0.9))
    variables = layer.init(jax.random.key(0), x)
    _, new = _apply(layer, variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "op",
    [
        ConvOp(name="", in_channels=4, filters=6),
        ConvOp(name="", in_channels=4, filters=6, kernel=3, stride=2),
        DepthwiseOp(name="", in_channels=4, filters=4, groups=4, kernel=3, stride=2),
        DepthwiseOp(name="", in_channels=4, filters=4, groups=4, kernel=5, dilation=2),
    ],
    ids=["pointwise", "full", "strided", "dilated"],
)
@pytest.mark.parametrize(
    "name_convention", [("mobilenet_v1", "keras"), ("mobilenet_v2", "keras"), ("mobilenet_v2", "timm")]
)
def test_conv_lowerings_agree_under_every_padding_with_the_norm_folded(op, name_convention):
    name, convention = name_convention
    spec = make_spec(name, convention=convention)
    scale, bias, mean, root = (_normal(op.filters, seed=seed) for seed in (2, 3, 4, 5))
    variables = {
        "params": {"conv": {"kernel": _normal(*op.kernel_shape)}, "norm": {"scale": scale, "bias": bias}},
        "batch_stats": {"norm": {"mean": mean, "var": root**2 + 0.1}},
    }
    bound = {"spec": spec, "dtype": jnp.float32, "depthwise_impl": "auto"}
    for size in ((7, 10), (8, 9)):
        x = _normal(2, *size, 4, seed=1)
        auto, plain = (
            ConvNorm(
                op,
                Layers(functools.partial(Conv, **bound, lowering=lowering), functools.partial(norm, spec=spec), Dense),
            )
            for lowering, norm in (("auto", Norm), ("plain", PlainNorm))
        )
        found, expected = (_apply(layer, variables, x, use_running_average=True) for layer in (auto, plain))
        assert found.shape == (2, *op.output_size(*size, spec.padding), op.filters)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_spatial_mean_of_bfloat16_is_summed_in_float32():
    # 10,000 ones: a bfloat16 sum would stop at 256.
    assert spatial_mean(jnp.ones((1, 100, 100, 1), jnp.bfloat16)).item() == 1
    assert spatial_mean(jnp.ones((1, 2, 2, 1), jnp.bfloat16)).dtype == jnp.bfloat16


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    n, rate = 20_000, 0.3
    out = np.asarray(drop_path(jnp.ones((n, 2, 1, 3)), rate, jax.random.key(0)))
    dropped = (out == 0).all((1, 2, 3))
    assert dropped.mean() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    np.testing.assert_allclose(out[~dropped], 1 / (1 - rate), rtol=1e-6)


def test_the_folded_shift_is_added_in_float32():
    """The network's mean is near its inputs, so that rounding it to bfloat16 would move the small difference."""
    norm = Norm("linear", 8, SPEC)
    mean = 100 + np.arange(8, dtype=np.float32) / 16  # bfloat16 has steps of 1/2 here
    variables = {
        "params": {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)},
        "batch_stats": {"mean": mean, "var": np.full(8, 1 - SPEC.bn_epsilon, np.float32)},
    }
    y = jnp.asarray(100 + _normal(2, 3, 3, 8), jnp.bfloat16)
    found = norm.apply(variables, y, jnp.ones(8), method="finish")
    assert found.dtype == jnp.bfloat16  # pyright: ignore[reportAttributeAccessIssue]
    exact = norm.apply(variables, y.astype(jnp.float32), jnp.ones(8), method="finish")
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))  # pyright: ignore[reportAttributeAccessIssue]
