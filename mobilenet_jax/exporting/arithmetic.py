"""The arithmetic of int8 kernels as LiteRT runs them, in float32 that holds integers.

A value is held as its levels: the int8 code less the zero point, an integer from -255 to 255 in float32. Each function
rounds as the kernel of XNNPACK or, where it says so, the kernel of TFLite that LiteRT runs. Gradients pass the
roundings straight through and are 0 where a value saturates. Scales get no gradient.

XLA may contract, reorder or replace float operations, and one level more or less grows through a network. So a product
that feeds a rounding is behind `lax.optimization_barrier`.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mobilenet_jax.models import cpu

SMALLEST, LARGEST = -128, 127  # codes
_KERNEL_LEVELS = 127  # of either sign: -128 is not used, so that kernels are symmetric
_SMALLEST_SCALE = np.float32(1e-9)  # of the filters that are all 0
# Products of a level and a kernel's level that a float32 can add up and still hold every integer.
_EXACT_TERMS = 2**24 // ((LARGEST - SMALLEST) * _KERNEL_LEVELS)


class Encoding(NamedTuple):
    """The meaning of a map's codes: a code stands for the number (code - zero) * scale."""

    scale: Any  # float32 [], of JAX or NumPy
    zero: Any  # int32 []


def keep(x: Any) -> Any:
    """Return x, an array or a tree of arrays; XLA computes it as written, whatever uses it."""
    return lax.optimization_barrier(x)


def make_encoding(low: jax.Array, high: jax.Array) -> Encoding:
    """Return the encoding of the numbers from `low` to `high`; the range is extended to 0, which is always exact."""
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    # A product, because XLA makes a product of a division by a constant.
    scale = keep(jnp.maximum(high - low, 1e-6) * np.float32(1 / 255))
    return Encoding(scale, _round_codes(SMALLEST - low / scale).astype(jnp.int32))


def straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """Return exactly `value`, with the gradient of x."""
    return lax.stop_gradient(value) + (x - lax.stop_gradient(x))


def saturate(x: jax.Array, encoding: Encoding, activation: str = "linear") -> jax.Array:
    """Round x, in levels, half to even; keep it within int8 and within the activation: linear, relu or relu6.

    The bounds of an activation are codes, rounded as `xnn_qs8_quantize` does.
    """
    zero = encoding.zero.astype(jnp.float32)

    low = zero if activation in ("relu", "relu6") else SMALLEST
    high = _round_codes(6 / encoding.scale + zero) if activation == "relu6" else LARGEST
    kept = lax.clamp(low - zero, x, high - zero)
    # The extremes of a range lie on its bounds, where the gradient of `clamp` is 0 already.
    return _round(jnp.where(kept == x, x, kept))


def _round(x: jax.Array) -> jax.Array:
    """Round half to even, with the gradient of x. Tracing `lax.round` takes a fraction of the time of `jnp.round`."""
    return straight_through(x, lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN))


def _round_codes(x: jax.Array) -> jax.Array:
    return lax.round(lax.clamp(np.float32(SMALLEST), x, np.float32(LARGEST)), lax.RoundingMethod.TO_NEAREST_EVEN)


def encode(x: jax.Array, output: Encoding) -> jax.Array:
    """Return numbers in levels of `output`, as XNNPACK converts float32 to int8: times the inverse of the scale."""
    return x * keep(1 / output.scale)


def decode(levels: jax.Array, encoding: Encoding) -> jax.Array:
    """Return the numbers that levels stand for."""
    return levels * encoding.scale


def quantize_kernel(kernel: jax.Array, *, per_tensor: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return (levels, scales [C]) of a kernel [..., C]; each filter has its own scale, its largest weight / 127.

    `per_tensor`: all filters have the scale of the largest weight. The levels' gradient is that of kernel / scale.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(kernel)), axis=tuple(range(kernel.ndim - 1)))
    if per_tensor:
        largest = jnp.full_like(largest, jnp.max(largest))
    scales = keep(jnp.maximum(largest, _SMALLEST_SCALE) * np.float32(1 / _KERNEL_LEVELS))
    # A product off by a rounding, as 127.00001, is rounded to 127.
    levels = kernel * keep(1 / scales).reshape(*[1] * (kernel.ndim - 1), -1)
    return _round(levels), scales


def quantize_bias(bias: jax.Array, unit: jax.Array) -> jax.Array:
    """Return a bias [C] in whole units [C] within int32: a unit is the scale of the inputs times that of the filter."""
    bound = np.float32(2**31 - 128)  # the largest float32 below 2**31
    return _round(lax.clamp(-bound, bias / unit, bound))


def convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int, pads: cpu.Pads, dilation: int, groups: int
) -> list[jax.Array]:
    """Return parts [B, H', W', D] of the sums of products of levels [B, H, W, C] and of a kernel.

    Each part is the sum over so few channels that every integer on the way is exact in float32.
    """
    window = {"stride": stride, "pads": pads, "dilation": dilation}
    channels = kernel.shape[2]
    if groups > 1 and channels == 1 and groups == kernel.shape[3]:
        return [cpu.depthwise_conv(x, kernel, **window)]
    parts = []
    size = max(1, _EXACT_TERMS // (kernel.shape[0] * kernel.shape[1]))
    maps = x.reshape(*x.shape[:3], groups, channels)
    for start in range(0, channels, size):
        part = maps[..., start : start + size].reshape(*x.shape[:3], -1)
        parts.append(cpu.full_conv(part, kernel[:, :, start : start + size], groups=groups, **window))
    return parts


def multiply_matrix(x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """Return parts [B, D] of the products of levels [B, C] and of a kernel [C, D], as `convolve` does."""
    parts = [slice(start, start + _EXACT_TERMS) for start in range(0, len(kernel), _EXACT_TERMS)]
    return [x[:, part] @ kernel[part] for part in parts]


def accumulate(parts: list[jax.Array], bias: jax.Array) -> jax.Array:
    """Return the int32 sum of exact parts [..., C] and of a bias [C] in whole units, rounded to float32."""
    terms = [*parts, bias.reshape(*[1] * (parts[0].ndim - 1), -1)]
    total = functools.reduce(operator.add, (term.astype(jnp.int32) for term in terms))
    return straight_through(functools.reduce(operator.add, terms), total.astype(jnp.float32))


def rescale(sums: jax.Array, unit: jax.Array, output: Encoding) -> jax.Array:
    """Return int32 sums [..., C], in units [C], in levels of `output`: one float32 factor for each channel."""
    factor = keep(unit / keep(jnp.broadcast_to(output.scale, unit.shape)))
    return sums * factor.reshape(*[1] * (sums.ndim - 1), -1)


def add(x: jax.Array, y: jax.Array, inputs: tuple[Encoding, Encoding], output: Encoding) -> jax.Array:
    """Return the sum of two maps in levels of `output`, by XNNPACK's factors of 21 bits; the half is rounded up."""
    ratios = [keep(keep(encoding.scale) / output.scale) for encoding in inputs]
    shift = 21 - jnp.frexp(jnp.maximum(*ratios))[1]
    factors = [jnp.round(jnp.ldexp(ratio, shift)).astype(jnp.int32) for ratio in ratios]
    total = x.astype(jnp.int32) * factors[0] + y.astype(jnp.int32) * factors[1]
    total = (total + (1 << (shift - 1))) >> shift
    return straight_through(x * ratios[0] + y * ratios[1], total.astype(jnp.float32))


def multiply(x: jax.Array, y: jax.Array, inputs: tuple[Encoding, Encoding], output: Encoding) -> jax.Array:
    """Return the product of two maps in levels of `output`."""
    return x * y * keep(keep(inputs[0].scale * inputs[1].scale) / output.scale)


def mean(x: jax.Array, given: Encoding, output: Encoding) -> jax.Array:
    """Return the spatial mean [B, C] of a map [B, H, W, C] in levels of `output`.

    A half is rounded so that the code is even, and not the level as elsewhere.
    """
    pixels = x.shape[1] * x.shape[2]
    y = jnp.sum(x, axis=(1, 2)) * keep(keep(given.scale / output.scale) / pixels)
    nearest = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)
    other = y + (y - nearest)  # an integer where y is a half
    is_odd = ((nearest + output.zero) % 2 == 1) & (jnp.abs(y - nearest) == 0.5)
    return straight_through(y, jnp.where(is_odd, other, nearest))


def average_pairs(x: jax.Array, encoding: Encoding) -> jax.Array:
    """Return the averages of 2x2 pixels in the same levels.

    TFLite's kernel divides the sum of four codes and rounds half away from 0.
    """
    zero = encoding.zero.astype(jnp.float32)
    sums = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    average = (sums + 4 * zero) / 4
    return straight_through(sums / 4, lax.round(average, lax.RoundingMethod.AWAY_FROM_ZERO) - zero)


def activate(x: jax.Array, function: Callable, given: Encoding, output: Encoding) -> jax.Array:
    """Return function(x) in levels of `output`, as from TFLite's tables; the half is rounded away from 0."""
    y = function(decode(x, given)) / output.scale
    return straight_through(y, lax.round(y, lax.RoundingMethod.AWAY_FROM_ZERO))


def hard_swish(x: jax.Array, given: Encoding, output: Encoding) -> jax.Array:
    """Return x * relu6(x + 3) / 6 in levels of `output`, in the 16-bit fixed point of TFLite's reference kernel."""
    fine = given.scale * np.float32(1 / 128)
    gate_factor, gate_exponent = _to_fixed_point(keep(fine / np.float32(3 / 32768)))
    out_factor, out_exponent = _to_fixed_point(keep(fine / output.scale))
    wide = x.astype(jnp.int32) * 128
    unscaled = _multiply_high(wide, out_factor)
    gate = jnp.where(gate_exponent > 0, _shift_left(wide, jnp.maximum(gate_exponent - 1, 0)), wide)
    gate = _multiply_high(gate, gate_factor)
    gate = jnp.where(gate_exponent > 0, _shift_left(gate, 1), gate)
    gate = _shift_right(gate, jnp.maximum(-gate_exponent, 0))
    gate = (gate + (1 << 15)) >> 1
    product = gate * unscaled
    halved = jnp.sign(product) * (jnp.abs(product) >> 15)  # towards 0
    levels = _shift_right(halved, jnp.maximum(-out_exponent, 0)).astype(jnp.float32)
    smooth = jax.nn.hard_swish(x * given.scale) / output.scale
    return straight_through(smooth, levels)


def _to_fixed_point(number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (factor, exponent): number = factor / 2**15 * 2**exponent, the factor in 15 bits."""
    mantissa, exponent = jnp.frexp(number)
    factor = jnp.floor(mantissa * 2**15 + 0.5).astype(jnp.int32)
    return jnp.minimum(factor, 2**15 - 1), exponent


def _multiply_high(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Return x * factor / 2**15 of 16-bit integers; the half is rounded up."""
    return (x * factor + (1 << 14)) >> 15


def _shift_left(x: jax.Array, by: jax.Array | int) -> jax.Array:
    return jnp.clip(x << by, -(2**15), 2**15 - 1)


def _shift_right(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return x / 2**by; the half is rounded away from 0."""
    return jnp.sign(x) * ((jnp.abs(x) + ((1 << by) >> 1)) >> by)
