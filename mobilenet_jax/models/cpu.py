"""The fast forms of a network's layers: all code that exists because XLA:CPU is slow at the textbook forms.

Why is it fast on a CPU?
  Depthwise convolution: XLA:CPU lowers the grouped convolution to naive loops, more than ten times slower than a sum
    of k*k shifted slices, which it fuses into one pass. Forward and gradients are such sums (`depthwise_conv`).
  1x1 convolution: a matrix product of rows of pixels (`full_conv`).
  Stem: with 3 input channels the convolution is up to twice as slow as one matrix product of windows (`full_conv`).
  Batch norm: one pass over the map forward, one backward, which recomputes the activation's input instead of keeping
    it (`cpu_norm.normalise`).
  Sums over pixels: a product with ones, several times faster than the reduction of leading axes (`sum_pixels`).

What runs on a TPU or GPU?
  The textbook forms. `lax.platform_dependent` chooses them when the program is lowered for the platform: every
  convolution is `plain_conv`, which is `lax.conv_general_dilated`, and batch norm sums pixels with `jnp.sum` and has
  JAX's own gradient. Compiled for a TPU v5e, a step of V2 with the one-pass gradient accesses 4% more bytes.
  `tests/models/test_programs.py` holds the operations. With `lowering="plain"` nothing here runs but `plain_conv`.

The numbers are those of the textbook forms, up to rounding; `tests/models/test_cpu.py` and `test_network.py` hold them
together.
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
_FEW_CHANNELS = 4
_PARTS = 8  # terms added elementwise before the reduction in the kernel's gradient; 4 to 16 are about as fast
Pads = tuple[tuple[int, int], tuple[int, int]]


def plain_conv(
    images: jax.Array, kernel: jax.Array, *, stride: int, pads: Pads, dilation: int = 1, groups: int = 1
) -> jax.Array:
    """Convolve [B, H, W, C] with a kernel [k, k, C / groups, D] in the textbook form."""
    return lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def full_conv(
    images: jax.Array, kernel: jax.Array, *, stride: int, pads: Pads, dilation: int = 1, groups: int = 1
) -> jax.Array:
    """Compute `plain_conv`; on a CPU, a 1x1 convolution and a stem are matrix products."""
    if len(kernel) == stride == groups == 1:
        return _pointwise_conv(images, kernel, _precision())
    plain = functools.partial(plain_conv, stride=stride, pads=pads, dilation=dilation, groups=groups)
    if images.shape[-1] <= _FEW_CHANNELS and dilation == groups == 1:
        columns = functools.partial(_conv_of_few_channels, stride=stride, pads=pads)
        return lax.platform_dependent(images, kernel, cpu=columns, default=plain)
    return plain(images, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise_conv(images, kernel, precision):
    return lax.platform_dependent(images, kernel, cpu=_rows_product, default=_plain_pointwise)


def _pointwise_forward(images, kernel, precision):
    return _pointwise_conv(images, kernel, precision), (images, kernel)


@functools.partial(jax.jit, static_argnums=0)
def _pointwise_backward(precision, residuals, gradient):
    forms = {"cpu": _differentiate(_rows_product), "default": _differentiate(_plain_pointwise)}
    with jax.default_matmul_precision(precision):
        return lax.platform_dependent(*residuals, gradient, **forms)


_pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


def _precision() -> str | None:
    """Return the precision of `jax.default_matmul_precision`: a backward pass is traced outside of that context."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _differentiate(conv):
    """Return the function from (images, kernel, gradient of the output) to the gradients of images and kernel."""
    return lambda images, kernel, gradient: jax.vjp(conv, images, kernel)[1](gradient)


def _plain_pointwise(images, kernel):
    return plain_conv(images, kernel, stride=1, pads=((0, 0), (0, 0)))


def _rows_product(images, kernel):
    return _pointwise(images, kernel[0, 0])


def _pointwise(x, kernel):
    """[B, H, W, I] times [I, O], as rows: with maps, XLA:CPU transposes a copy to get the kernel's gradient."""
    rows = jnp.einsum("pi,io->po", x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], -1)


def _conv_of_few_channels(x, kernel, *, stride, pads):
    """One matrix product of windows, laid out side by side.

    `stride` pixels of a row are taken together as one of `stride` times the channels, so that a window's row is a few
    whole ones. If these are more than the kernel is wide, the kernel gets zeros.
    """
    size, _, channels, filters = kernel.shape
    (top, bottom), (left, right) = pads
    height, width = ((n + sum(pad) - size) // stride + 1 for n, pad in zip(x.shape[1:3], pads, strict=True))
    groups = -(-size // stride)
    right += max(0, (width - 1 + groups) * stride - (x.shape[2] + left + right))
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))[:, :, : (width - 1 + groups) * stride]
    x = x.reshape(*x.shape[:2], -1, stride * channels)
    rows = [x[:, i : i + (height - 1) * stride + 1 : stride] for i in range(size)]
    windows = jnp.concatenate([row[:, :, j : j + width] for row in rows for j in range(groups)], axis=-1)
    kernel = jnp.pad(kernel, ((0, 0), (0, groups * stride - size), (0, 0), (0, 0)))
    return _pointwise(windows, kernel.reshape(-1, filters))


def depthwise_conv(
    images: jax.Array, kernel: jax.Array, *, stride: int, pads: Pads, dilation: int = 1, impl: str = "auto"
) -> jax.Array:
    """Convolve each channel of [B, H, W, C] with its own filter of a kernel [k, k, 1, C].

    `pads` are zeros ((top, bottom), (left, right)). `impl` "auto" runs shifted sums on a CPU and the grouped
    convolution elsewhere, "shifted_sum" and "feature_group_count" run one of them everywhere. Raises ValueError for
    another `impl`.
    """
    check_choice("depthwise_impl", impl, IMPLEMENTATIONS)
    geometry = _Geometry(stride, pads, dilation)
    if impl == "feature_group_count":
        return _grouped_conv(images, kernel, geometry)
    return _convolve(images, kernel, geometry, impl, _precision())


class _Geometry(NamedTuple):
    stride: int
    pads: Pads
    dilation: int


def _grouped_conv(images, kernel, geometry):
    return plain_conv(images, kernel, **geometry._asdict(), groups=images.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(images: jax.Array, kernel: jax.Array, geometry: _Geometry, impl: str, precision: str | None) -> jax.Array:
    shifted, grouped = (functools.partial(form, geometry=geometry) for form in (_shifted_sum, _grouped_conv))
    return _choose(impl, shifted, grouped, images, kernel)


def _forward(images, kernel, geometry, impl, precision):
    return _convolve(images, kernel, geometry, impl, precision), (images, kernel)


def _backward(geometry, impl, precision, residuals, gradient):
    shifted = functools.partial(_gradients, geometry=geometry)
    grouped = _differentiate(functools.partial(_grouped_conv, geometry=geometry))
    with jax.default_matmul_precision(precision):
        return _choose(impl, shifted, grouped, *residuals, gradient)


_convolve.defvjp(_forward, _backward)


def _choose(impl, shifted, grouped, *arrays):
    # Inside the custom gradient: to differentiate a choice of platform, JAX would trace both branches again.
    return shifted(*arrays) if impl == "shifted_sum" else lax.platform_dependent(*arrays, cpu=shifted, default=grouped)


# Jitted, so that blocks of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames="geometry")
def _shifted_sum(images, kernel, *, geometry):
    first, last, (stride, pads, dilation) = _find_useful_taps(images.shape, len(kernel), geometry)
    kernel = kernel[first:last, first:last]
    padded = _pad(images, pads)
    size = _output_size(padded.shape, kernel.shape, stride, dilation)
    return _weighted_sum(
        (_window(padded, i * dilation, j * dilation, stride, size), kernel[i, j, 0]) for i, j in _taps(kernel)
    )


@functools.partial(jax.jit, static_argnames="geometry")
def _gradients(images, kernel, gradient, *, geometry):
    """Return the gradients of images and kernel, both from one padded copy of the output's gradient.

    XLA fuses the computation of an array into every loop that reads it, ten loops here. A padded array is computed
    once.
    """
    first, last, (stride, pads, dilation) = _find_useful_taps(images.shape, len(kernel), geometry)
    unused, kernel = (first, len(kernel) - last, 0), kernel[first:last, first:last]
    (top, bottom), (left, right) = pads
    rows = -(-(images.shape[1] + top + bottom) // stride)
    columns = -(-(images.shape[2] + left + right) // stride)
    reach = (kernel.shape[0] - 1) * dilation // stride
    # Outputs that do not exist contribute zeros on either side.
    _, out_h, out_w, _ = gradient.shape
    gradient = _pad(gradient, ((reach, max(0, rows - out_h)), (reach, max(0, columns - out_w))))
    kernel_gradient = _kernel_gradient(gradient, images, kernel, (out_h, out_w), reach, stride, pads, dilation)
    return (
        _image_gradient(gradient, kernel, images.shape, (rows, columns), stride, pads, dilation),
        lax.pad(kernel_gradient, jnp.zeros((), kernel.dtype), (unused, unused, (0, 0, 0), (0, 0, 0))),
    )


def _find_useful_taps(shape, size, geometry):
    """Return (first, last + 1, geometry without the others) of the taps of a kernel that read pixels, not only padding.

    Of a 5x5 kernel on a 2x2 map, padded by 2, the outer taps read zeros. They cost as much as the others. The range is
    that of rows and columns together, so that the kernel stays square.
    """
    stride, pads, dilation = geometry
    if dilation > 1:  # the padding that is left could be below 0
        return 0, size, geometry
    useful = {
        tap
        for count, (before, after) in zip(shape[1:3], pads, strict=True)
        for place in range((count + before + after - size) // stride + 1)
        for tap in range(size)
        if 0 <= place * stride + tap - before < count
    }
    first, last = min(useful), max(useful) + 1
    (top, bottom), (left, right) = pads
    left_out = size - last
    return first, last, _Geometry(stride, ((top - first, bottom - left_out), (left - first, right - left_out)), 1)


def _image_gradient(gradient, kernel, shape, size, stride, pads, dilation):
    """Return the transposed sum, phase by phase of the stride, so that no inserted zeros are multiplied.

    Output (y, x) reads padded row y * stride + i * dilation. So padded row q * stride + r is read by the taps with
    i * dilation = r (mod stride), at output row q - (i * dilation - r) / stride. The same holds for columns.
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
    if not terms:  # the dilation is even and the phase odd: nothing reads these pixels
        return jnp.zeros((gradient.shape[0], *size, gradient.shape[3]), gradient.dtype)
    return _weighted_sum(terms)


def _kernel_gradient(gradient, images, kernel, size, reach, stride, pads, dilation):
    """Return, for each tap, the sum over images and pixels of its window times the gradient.

    XLA:CPU does not fuse slices into a reduction, so a plain sum would copy every window first. Products that are
    added up over a few images fuse into one loop, and a product with ones sums the rest: 2 to 10 times faster than
    nine reductions.
    """
    padded = _split(_pad(images, pads))
    gradients = [_window(part, reach, reach, 1, size) for part in _split(gradient)]

    def tap(i, j):
        windows = (_window(part, i * dilation, j * dilation, stride, size) for part in padded)
        return _sum_parts([lax.mul(window, gradient) for window, gradient in zip(windows, gradients, strict=True)])

    return jnp.stack([tap(i, j) for i, j in _taps(kernel)]).reshape(kernel.shape).astype(kernel.dtype)


def sum_pixels(images: jax.Array) -> jax.Array:
    """Sum [B, H, W, C] to [C] in float32 or wider, by a product with ones."""
    return _sum_parts(_split(images))


def _split(images):
    """Split a batch into up to _PARTS equal parts.

    The n-th of p parts has every p-th image, starting at the n-th, and p divides the share of a device. So a batch that
    is split over devices stays split, and no image moves to another device.
    """
    parts = math.gcd(len(images) // _count_shares() or len(images), _PARTS)
    folded = images.reshape(-1, parts, *images.shape[1:])
    # Half-precision products are summed in float32.
    folded = folded.astype(jnp.promote_types(images.dtype, jnp.float32))
    return [lax.index_in_dim(folded, n, axis=1, keepdims=False) for n in range(parts)]


def _count_shares():
    """Return over how many devices the batch is split that is traced: 1 if the function sees one device's share."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in sizes if kind != jax.sharding.AxisType.Manual)


def _sum_parts(parts):
    partial = functools.reduce(lax.add, parts).reshape(-1, parts[0].shape[-1])
    # Two rows of ones, because XLA:CPU hands a product of matrices to a library. For each product with a vector it
    # compiles a program: 360 programs in V2's step, and a quarter of its compilation.
    return (jnp.ones((2, len(partial)), partial.dtype) @ partial)[0]


def _pad(images, pads):
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)))


def _taps(kernel):
    return itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))


def _window(images, top, left, stride, size):
    """Return the strided window whose first pixel is (top, left) and whose shape is `size`."""
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
