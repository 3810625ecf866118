"""Depthwise convolution, the one door to it.

TPU and GPU run the grouped convolution that `feature_group_count` asks for. XLA:CPU lowers that to naive
loops, more than ten times slower than a sum of k*k shifted slices, which it fuses into one pass; so on CPU
the same numbers come from shifted slices, with gradients formulated alike.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mobilenet_jax.models.spec import check_choice

IMPLEMENTATIONS = ("auto", "feature_group_count", "shifted_sum")
_PARTS = 8  # terms added elementwise before the reduction in the kernel's gradient; 4 to 16 are about as fast
Pads = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(
    images: jax.Array, kernel: jax.Array, *, stride: int, pads: Pads, dilation: int = 1, impl: str = "auto"
) -> jax.Array:
    """Convolve each channel with its own filter: [B, H, W, C] with kernel [k, k, 1, C].

    `pads` are zeros ((top, bottom), (left, right)). `impl` "auto" chooses at lowering, by the platform
    compiled for. Raises ValueError for another `impl`.
    """
    check_choice("depthwise_impl", impl, IMPLEMENTATIONS)
    if impl == "feature_group_count":
        return grouped_conv(images, kernel, stride=stride, pads=pads, dilation=dilation)
    return _convolve(images, kernel, _Geometry(stride, pads, dilation), impl)


class _Geometry(NamedTuple):
    stride: int
    pads: Pads
    dilation: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images: jax.Array, kernel: jax.Array, geometry: _Geometry, impl: str) -> jax.Array:
    grouped = functools.partial(grouped_conv, **geometry._asdict())
    return _choose(impl, functools.partial(_shifted_sum, geometry=geometry), grouped, images, kernel)


def _forward(images, kernel, geometry, impl):
    return _convolve(images, kernel, geometry, impl), (images, kernel)


def _backward(geometry, impl, residuals, gradient):
    def grouped(images, kernel, gradient):
        return jax.vjp(functools.partial(grouped_conv, **geometry._asdict()), images, kernel)[1](gradient)

    return _choose(impl, functools.partial(_gradients, geometry=geometry), grouped, *residuals, gradient)


_convolve.defvjp(_forward, _backward)


def _choose(impl, shifted, grouped, *arrays):
    # Within the custom gradient, for JAX would trace both branches again to differentiate a choice of platform.
    return shifted(*arrays) if impl == "shifted_sum" else lax.platform_dependent(*arrays, cpu=shifted, default=grouped)


def grouped_conv(images: jax.Array, kernel: jax.Array, *, stride: int, pads: Pads, dilation: int) -> jax.Array:
    """The textbook form: `feature_group_count` equal to the channels."""
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=images.shape[-1],
    )


# Jitted, that blocks of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames="geometry")
def _shifted_sum(images, kernel, *, geometry):
    stride, pads, dilation = geometry
    padded = _pad(images, pads)
    size = _output_size(padded.shape, kernel.shape, stride, dilation)
    return _weighted_sum(
        (_window(padded, i * dilation, j * dilation, stride, size), kernel[i, j, 0]) for i, j in _taps(kernel)
    )


@functools.partial(jax.jit, static_argnames="geometry")
def _gradients(images, kernel, gradient, *, geometry):
    """Of images and kernel, both from one padded copy of the output's gradient.

    XLA fuses what computes an array into every loop that reads it, ten here; a padded array it computes once.
    """
    stride, pads, dilation = geometry
    (top, bottom), (left, right) = pads
    rows = -(-(images.shape[1] + top + bottom) // stride)
    columns = -(-(images.shape[2] + left + right) // stride)
    reach = (kernel.shape[0] - 1) * dilation // stride
    # Outputs that do not exist contribute zeros on either side.
    _, out_h, out_w, _ = gradient.shape
    gradient = _pad(gradient, ((reach, max(0, rows - out_h)), (reach, max(0, columns - out_w))))
    return (
        _image_gradient(gradient, kernel, images.shape, (rows, columns), stride, pads, dilation),
        _kernel_gradient(gradient, images, kernel, (out_h, out_w), reach, stride, pads, dilation),
    )


def _image_gradient(gradient, kernel, shape, size, stride, pads, dilation):
    """The transposed sum, phase by phase of the stride, so that no inserted zeros are multiplied.

    Output (y, x) reads padded row y * stride + i * dilation; so padded row q * stride + r is read by the taps
    with i * dilation = r (mod stride), at output row q - (i * dilation - r) / stride. Columns alike.
    """
    (top, _), (left, _) = pads
    rows, columns = size
    reach = (kernel.shape[0] - 1) * dilation // stride
    phases = [
        _phase(gradient, kernel, (r, s), (rows, columns), reach, stride, dilation)
        for r, s in itertools.product(range(stride), repeat=2)
    ]
    if stride == 1:
        padded = phases[0]
    else:
        grid = jnp.stack(phases, axis=3).reshape(shape[0], rows, columns, stride, stride, shape[3])
        padded = grid.transpose(0, 1, 3, 2, 4, 5).reshape(shape[0], rows * stride, columns * stride, shape[3])
    return padded[:, top : top + shape[1], left : left + shape[2]]


def _phase(gradient, kernel, phase, size, reach, stride, dilation):
    terms = []
    for i, j in _taps(kernel):
        offsets = [tap * dilation - r for tap, r in zip((i, j), phase, strict=True)]
        if all(offset % stride == 0 for offset in offsets):
            top, left = (reach - offset // stride for offset in offsets)
            terms.append((_window(gradient, top, left, 1, size), kernel[i, j, 0]))
    if not terms:  # dilation even, phase odd: nothing reads these pixels
        return jnp.zeros((gradient.shape[0], *size, gradient.shape[3]), gradient.dtype)
    return _weighted_sum(terms)


def _kernel_gradient(gradient, images, kernel, size, reach, stride, pads, dilation):
    """For each tap, the sum over images and pixels of its window times the gradient.

    XLA:CPU does not fuse slices into a reduction: a plain sum would copy every window first. Added up over a
    few images the products fuse into one loop, and what is left is a sum that a product with ones does fast:
    2 to 10 times faster than nine reductions.
    """
    padded = _split(_pad(images, pads))
    gradients = [_window(part, reach, reach, 1, size) for part in _split(gradient)]

    def tap(i, j):
        windows = (_window(part, i * dilation, j * dilation, stride, size) for part in padded)
        return _sum_parts([lax.mul(window, gradient) for window, gradient in zip(windows, gradients, strict=True)])

    return jnp.stack([tap(i, j) for i, j in _taps(kernel)]).reshape(kernel.shape).astype(kernel.dtype)


def sum_pixels(images: jax.Array) -> jax.Array:
    """[B, H, W, C] to [C] in float32 or wider, for XLA:CPU as `_kernel_gradient` has it."""
    return _sum_parts(_split(images))


def _split(images):
    """Up to _PARTS equal parts; the n-th has every _PARTS-th image from the n-th on, so a batch split over devices
    stays so."""
    parts = math.gcd(len(images), _PARTS)
    folded = images.reshape(-1, parts, *images.shape[1:])
    folded = folded.astype(jnp.promote_types(images.dtype, jnp.float32))  # where half-precision products are summed
    return [lax.index_in_dim(folded, n, axis=1, keepdims=False) for n in range(parts)]


def _sum_parts(parts):
    partial = functools.reduce(lax.add, parts).reshape(-1, parts[0].shape[-1])
    return jnp.ones((len(partial),), partial.dtype) @ partial


def _pad(images, pads):
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)))


def _taps(kernel):
    return itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))


def _window(images, top, left, stride, size):
    """The strided window whose first pixel is (top, left) and whose shape is `size`."""
    batch, _, _, channels = images.shape
    height, width = size
    return lax.slice(
        images,
        (0, top, left, 0),
        (batch, top + (height - 1) * stride + 1, left + (width - 1) * stride + 1, channels),
        (1, stride, stride, 1),
    )


def _weighted_sum(terms):
    products = (window * weight[None, None, None, :] for window, weight in terms)
    return functools.reduce(lax.add, products)


def _output_size(shape, kernel_shape, stride, dilation):
    reach = dilation * (kernel_shape[0] - 1)
    return tuple((n - reach - 1) // stride + 1 for n in shape[1:3])
