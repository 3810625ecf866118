import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import (
    Conv,
    FusedInvertedResidual,
    InvertedResidual,
    MultiQueryAttention,
    Separable,
    SqueezeExcite,
    UniversalInverted,
)
from mobilenet_jax.models.zoo import MODELS, make_spec

# A net with every kind of row, for linen compiles a generator for each kernel.
BLOCKS = (
    Separable(filters=64),
    InvertedResidual(expanded=512, filters=128, kernel=5, se=SqueezeExcite()),
    FusedInvertedResidual(expanded=256, filters=96, group_size=64),
    UniversalInverted(expanded=192, filters=96, start=3, kernel=3),
    MultiQueryAttention(filters=96, heads=2, size=48, reduction=2, layer_scale=1e-5),
)
# Standard deviation of each kernel under "he": sqrt(2 / (k*k*C_out/groups)), the classifier's apart.
HE = {
    "stem/conv": math.sqrt(2 / (9 * 48)),
    "block_00/depthwise/conv": math.sqrt(2 / 9),
    "block_00/pointwise/conv": math.sqrt(2 / 64),
    "block_01/expand/conv": math.sqrt(2 / 512),
    "block_01/depthwise/conv": math.sqrt(2 / 25),
    "block_01/se/reduce": math.sqrt(2 / 128),
    "block_01/se/expand": math.sqrt(2 / 512),
    "block_01/project/conv": math.sqrt(2 / 128),
    "block_02/expand/conv": math.sqrt(2 / (9 * 256 / 4)),
    "block_02/project/conv": math.sqrt(2 / 96),
    "block_03/start/depthwise/conv": math.sqrt(2 / 9),
    "block_03/expand/conv": math.sqrt(2 / 192),
    "block_03/depthwise/conv": math.sqrt(2 / 9),
    "block_03/project/conv": math.sqrt(2 / 96),
    **{f"block_04/{name}/depthwise/conv": math.sqrt(2 / (9 * (1 + 96))) for name in ("key", "value")},
    **{f"block_04/{name}/project/conv": math.sqrt(2 / (96 + 48)) for name in ("key", "value")},
    "block_04/query/project/conv": math.sqrt(2 / (96 + 96)),
    "block_04/output/project/conv": math.sqrt(2 / (96 + 96)),
    "head/conv": math.sqrt(2 / 256),
    "hidden": math.sqrt(2 / 320),
    "classifier": 0.01,
}


def _flatten(tree) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(tree, sep="/"))


@functools.cache
def _kernels(model, init, how):
    """{path: kernel} by NumPy or by linen's own initialisers; of `model`'s constants, with the rows above."""
    spec = make_spec(model, num_classes=100, init=init)
    head = Conv(filters=256, kernel=1)
    module = MobileNet(replace(spec, stem=Conv(filters=48), blocks=BLOCKS, head=head, hidden=320))
    if how == "numpy":
        variables = init_variables(module, seed=3)
    else:
        # Compiling a generator for each kernel takes the time of this test.
        init = jax.jit(module.init, compiler_options={"xla_backend_optimization_level": 0})
        variables = init(jax.random.key(3), jnp.zeros((1, 8, 8, 3)))
    flat = _flatten(variables["params"])
    return {path.removesuffix("/kernel"): np.asarray(v) for path, v in flat.items() if path.endswith("kernel")}


def _assert_stddev(values, expected):
    # The standard error of the estimate from n values is 1 / sqrt(2 n); five of them.
    assert values.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * values.size))
    assert abs(values.mean()) < 5 * expected / math.sqrt(values.size)


@pytest.mark.parametrize("how", ["numpy", "linen"])
def test_trap_01_he_counts_fan_out_a_group(how):
    kernels = _kernels("mobilenet_v2", "he", how)
    assert kernels.keys() == HE.keys()
    for path, kernel in kernels.items():
        _assert_stddev(kernel, HE[path])
        if path.startswith("block_04"):  # uniform
            assert 0.98 < np.abs(kernel).max() / (math.sqrt(3) * HE[path]) <= 1 + 1e-6


@pytest.mark.parametrize("how", ["numpy", "linen"])
@pytest.mark.parametrize(("model", "stddev"), [("mobilenet_v1", 0.09), ("mobilenet_v3_small", 0.008)])
def test_slim_is_a_normal_cut_at_two_deviations(model, stddev, how):
    # Var of a standard normal cut at +-2: 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.7737.
    cut = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    for path, kernel in _kernels(model, "slim", how).items():
        assert np.abs(kernel).max() <= 2 * stddev * (1 + 1e-6), path
        _assert_stddev(kernel, cut * stddev)


def test_kernels_are_normal():
    values = _init("mobilenet_v2", 0)["params/head/conv/kernel"] / math.sqrt(2 / 1280)
    assert (np.abs(values) > 2).mean() == pytest.approx(0.0455, rel=0.03)  # nothing is cut
    assert (values**4).mean() == pytest.approx(3, rel=0.03)


@functools.cache
def _init(model, seed, **options):
    return _flatten(init_variables(create_model(model, num_classes=10, width=0.25, **options), seed=seed))


def test_values_depend_on_seed_and_path_alone():
    _init.cache_clear()
    first = _init("mobilenet_v2", 0)
    _init.cache_clear()
    again = _init("mobilenet_v2", 0)
    for path, value in first.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again[path])
    other_seed = _init("mobilenet_v2", 1)
    kernels = [path for path in first if path.endswith("kernel")]
    assert all((first[path] != other_seed[path]).any() for path in kernels)
    # No two kernels share their numbers.
    assert len({first[path].ravel()[:4].tobytes() for path in kernels}) == len(kernels)
    # Taking layers away changes none of those that stay.
    headless = _init("mobilenet_v2", 0, shortcut="none")
    assert headless.keys() == first.keys()
    with_se = _init("mobilenet_v2", 0, se_ratio=0.25)
    assert with_se.keys() > first.keys()
    assert all((with_se[path] == first[path]).all() for path in first)


def test_layer_scale_starts_near_zero():
    values = _init("mobilenet_v4_hybrid_medium", 0)
    gammas = [value for path, value in values.items() if path.endswith("layer_scale/gamma")]
    assert len(gammas) == 30  # all rows behind the fused one
    assert all((gamma == np.float32(1e-5)).all() for gamma in gammas)


def test_norms_start_as_the_identity():
    values = _init("mobilenet_v3_small", 0)
    assert {path.rsplit("/", 1)[1] for path in values} == {"kernel", "scale", "bias", "mean", "var"}
    for path, value in values.items():
        if not path.endswith("kernel"):
            assert (value == (1 if path.endswith(("scale", "var")) else 0)).all(), path


@pytest.mark.parametrize("model", [m for m in MODELS if ("_conv_medium" not in m and "_large" not in m) or "_v3_" in m])
def test_structure_is_linens(model):
    # The groups of EdgeTPU's second version divide its channels at width 1.
    module = create_model(model, num_classes=10, width=1.0 if "edgetpu" in model else 0.25)
    linen = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    numpy = init_variables(module, seed=0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), linen) == jax.tree.map(lambda x: (x.shape, x.dtype), numpy)
