"""The fast forms on a CPU against XLA's own convolution."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mobilenet_jax.models.cpu import depthwise_conv
from mobilenet_jax.models.ops import pads

# kernel, stride, dilation, padding, image [B, H, W, C]
CASES = [
    (3, 1, 1, "same", (2, 8, 8, 5)),
    (3, 1, 1, "symmetric", (1, 7, 9, 3)),
    (3, 2, 1, "same", (2, 8, 8, 4)),
    (3, 2, 1, "same", (1, 9, 6, 3)),
    (3, 2, 1, "symmetric", (2, 8, 11, 3)),
    (3, 2, 1, "end", (1, 8, 9, 3)),
    (3, 2, 1, "symmetric", (1, 1, 2, 3)),
    (3, 1, 2, "same", (2, 9, 6, 3)),
    (3, 2, 2, "symmetric", (1, 9, 10, 2)),
    (3, 1, 4, "symmetric", (1, 5, 4, 2)),
    (5, 1, 1, "same", (1, 6, 9, 3)),
    (5, 2, 1, "same", (2, 9, 8, 3)),
    (5, 2, 1, "symmetric", (1, 10, 7, 3)),
    (5, 2, 1, "same", (1, 2, 2, 3)),
    (5, 1, 2, "symmetric", (1, 9, 9, 2)),
    (7, 1, 1, "symmetric", (1, 8, 5, 2)),
    (7, 2, 1, "same", (1, 13, 8, 2)),
    (7, 2, 2, "same", (1, 13, 14, 2)),
    # Small maps: the outer taps read nothing but padding, and are left out.
    (3, 1, 1, "same", (2, 1, 1, 3)),
    (3, 2, 1, "symmetric", (2, 1, 1, 3)),
    (3, 2, 1, "end", (2, 2, 2, 3)),
    (5, 1, 1, "same", (2, 1, 1, 3)),
    (5, 1, 1, "symmetric", (2, 2, 2, 3)),
    (5, 1, 1, "same", (2, 1, 3, 3)),
    (5, 2, 1, "same", (2, 3, 3, 3)),
    (5, 2, 1, "symmetric", (8, 2, 1, 2)),
    (7, 1, 1, "same", (1, 2, 3, 2)),
    # Batches that the kernel's gradient adds up in 8 and in 4 parts.
    (3, 1, 1, "same", (16, 5, 6, 2)),
    (5, 2, 1, "same", (12, 7, 6, 2)),
]


def _run(case, dtype):
    """Return {impl: (output, image gradient, kernel gradient)} of the same random case."""
    k, stride, dilation, padding, shape = case
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.normal(size=shape), dtype)
    kernel = jnp.asarray(generator.normal(size=(k, k, 1, shape[-1])), dtype)
    rows, columns = (pads(n, k, stride, dilation, padding) for n in shape[1:3])
    conv = functools.partial(depthwise_conv, stride=stride, pads=(rows, columns), dilation=dilation)
    size = jax.eval_shape(functools.partial(conv, impl="feature_group_count"), images, kernel).shape
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=size), dtype)

    # One program for both: compiling takes the time of this test.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(images, kernel, cotangent):
        results = {}
        for impl in ("shifted_sum", "feature_group_count"):
            out, pull = jax.vjp(functools.partial(conv, impl=impl), images, kernel)
            results[impl] = (out, *pull(cotangent))
        return results

    return run(images, kernel, cotangent)


def _assert_close(results, tolerance):
    for name, found, expected in zip(
        ("output", "image gradient", "kernel gradient"),
        results["shifted_sum"],
        results["feature_group_count"],
        strict=True,
    ):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        expected = np.asarray(expected, np.float64)
        scale = np.abs(expected).max()
        assert scale > 0.1
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, rtol=0, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shifted_sum_is_the_grouped_convolution(case):
    with jax.enable_x64(True):
        _assert_close(_run(case, jnp.float64), 1e-12)


@pytest.mark.parametrize("case", [CASES[3], CASES[11]], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_shifted_sum_in_lower_precision(case, dtype, tolerance):
    _assert_close(_run(case, dtype), tolerance)


def test_kernel_gradient_in_bfloat16_is_summed_in_float32():
    # 4096 ones: bfloat16 counts no further than 256.
    images, kernel = jnp.ones((1, 64, 64, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    conv = functools.partial(depthwise_conv, stride=1, pads=((0, 0), (0, 0)), impl="shifted_sum")
    gradient = jax.grad(lambda w: conv(images, w).astype(jnp.float32).sum())(kernel)
    assert gradient.item() == 4096


def test_output_is_the_sum_over_the_window():
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.ones((3, 3, 1, 1))
    out = depthwise_conv(images, kernel, stride=2, pads=((0, 1), (0, 1)))
    # TensorFlow's SAME at an even size: windows start at 0 and 2, zeros only at the far edges.
    np.testing.assert_array_equal(out[0, :, :, 0], [[45.0, 39.0], [66.0, 50.0]])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_auto_is_the_grouped_convolution_on_accelerators(platform):
    """On an accelerator, forward and both gradients are convolutions, and nothing is sliced."""
    conv = functools.partial(depthwise_conv, stride=2, pads=((0, 1), (0, 1)))
    images, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 1, 6))

    def step(images, kernel):
        return jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1))(images, kernel), conv(images, kernel)

    texts = {
        name: export.export(jax.jit(step), platforms=[name])(images, kernel).mlir_module() for name in (platform, "cpu")
    }
    assert re.search(r"feature_group_count = 6\b", texts[platform])
    assert texts[platform].count("stablehlo.convolution") == 3
    assert "stablehlo.slice" not in texts[platform]
    assert "stablehlo.convolution" not in texts["cpu"]
    assert "stablehlo.slice" in texts["cpu"]


def test_unknown_implementation():
    with pytest.raises(ValueError, match="depthwise_impl is 'fast'; valid: auto, feature_group_count, shifted_sum"):
        depthwise_conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)), stride=1, pads=((1, 1), (1, 1)), impl="fast")
