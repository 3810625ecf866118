"""Convolution, batch norm, dense, squeeze-excite: each as textbooks have it and, where faster, otherwise."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mobilenet_jax.models.depthwise import depthwise_conv, grouped_conv, sum_pixels
from mobilenet_jax.models.init import make_kernel_init
from mobilenet_jax.models.spec import Op, Spec

LOWERINGS = ("auto", "plain")
_FEW_CHANNELS = 4

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "gelu": functools.partial(nn.gelu, approximate=False),
}
# What each does to a gradient, given the activation's input: JAX's own, but for relu6 at 0 and 6, where its halves
# come from divisions at every pixel.
_SLOPES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "linear": lambda x, gradient: gradient,
    "relu": lambda x, gradient: jnp.where(x > 0, gradient, 0),
    "relu6": lambda x, gradient: jnp.where((x > 0) & (x < 6), gradient, 0),
    "hard_swish": lambda x, gradient: jnp.where(x > 3, 1, jnp.where(x > -3, x / 3 + 0.5, 0)) * gradient,
    "gelu": lambda x, gradient: jax.vjp(ACTIVATIONS["gelu"], x)[1](gradient)[0],
}
# The hard sigmoid is relu6(x + 3) / 6, not the 0.2 x + 0.5 of older Keras.
GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "hard_sigmoid": nn.hard_sigmoid,
    "sigmoid": nn.sigmoid,
    "hard_swish": nn.hard_swish,
}


class Conv(nn.Module):
    """The convolution of an `Op`, without bias: [B, H, W, C_in] to [B, H', W', C_out]."""

    op: Op
    spec: Spec
    dtype: jnp.dtype
    lowering: str
    depthwise_impl: str

    @nn.compact
    def __call__(self, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C_in] to [B, H', W', C_out], padded by the spec's rule; outputs times `factor` [C_out]."""
        op = self.op
        shape = (op.kernel, op.kernel, op.in_channels // op.groups, op.filters)
        kernel = self.param("kernel", make_kernel_init(self.path, self.spec, op.groups), shape)
        if factor is not None:
            kernel = kernel * _wide(factor)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        pads = op.pads(x.shape[1], x.shape[2], self.spec.padding)
        if self.lowering == "auto" and op.depthwise:
            return depthwise_conv(
                x, kernel, stride=op.stride, pads=pads, dilation=op.dilation, impl=self.depthwise_impl
            )
        if self.lowering == "auto" and op.kernel == op.stride == 1:
            return _pointwise(x, kernel[0, 0])
        if op.depthwise:
            return grouped_conv(x, kernel, stride=op.stride, pads=pads, dilation=op.dilation)
        whole = functools.partial(_conv, stride=op.stride, pads=pads, dilation=op.dilation, groups=op.split)
        if self.lowering == "auto" and op.in_channels <= _FEW_CHANNELS and op.dilation == op.split == 1:
            columns = functools.partial(_conv_of_few_channels, stride=op.stride, pads=pads)
            return lax.platform_dependent(x, kernel, cpu=columns, default=whole)
        return whole(x, kernel)


def _conv(x, kernel, *, stride, pads, dilation, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=pads,
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _conv_of_few_channels(x, kernel, *, stride, pads):
    """The same as one matrix product: with a stem's 3 channels XLA:CPU's convolution is up to twice as slow.

    `stride` pixels of a row are taken together as one of `stride` times the channels, of which a window's row is a
    few whole ones; where that is more than the kernel is wide, the kernel has zeros.
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


def _pointwise(x, kernel):
    """[B, H, W, I] times [I, O]; of rows, for of maps XLA:CPU transposes a copy to get the kernel's gradient."""
    rows = jnp.einsum("pi,io->po", x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], -1)


class Norm(nn.Module):
    """Batch norm and activation in one pass over the map, with the variables of `nn.BatchNorm`.

    Statistics are float32 whatever the map's dtype, over all of the batch that the function sees: the global
    batch under `jit`, a device's share under `shard_map`.
    """

    activation: str
    features: int
    spec: Spec

    def setup(self) -> None:
        """Both ways of applying the norm share these."""
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same by the batch's statistics; the running ones move."""
        y, mean, var = _normalise(x, self.scale, self.bias, self.spec.bn_epsilon, self.activation)  # pyright: ignore[reportGeneralTypeIssues]
        if not self.is_initializing():
            keep = self.spec.bn_decay
            self.mean.value = keep * self.mean.value + (1 - keep) * lax.stop_gradient(mean)
            self.var.value = keep * self.var.value + (1 - keep) * lax.stop_gradient(var)
        return y

    def fold(self, conv: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """The same by the running statistics, which fold into the convolution's kernel."""
        factor = self.scale * lax.rsqrt(self.var.value + self.spec.bn_epsilon)
        y = conv(x, factor)
        shift = (self.bias - self.mean.value * factor).astype(y.dtype)
        return ACTIVATIONS[self.activation](y + _wide(shift))


def _wide(channels):
    """[C] beside [B, H, W, C]."""
    return channels[None, None, None, :]


def _sum_pixels(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [C].

    On CPU a product with ones is several times faster than XLA's reduction of leading axes; elsewhere a
    product would round its factors to fewer bits.
    """
    return lax.platform_dependent(x, cpu=sum_pixels, default=lambda maps: jnp.sum(maps, axis=(0, 1, 2)))


def _moments(x):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = x.size // x.shape[-1]
    mean = _sum_pixels(x) / count
    # E[x^2] - E[x]^2 reads the map once; rounding may take it below 0.
    return mean, jnp.maximum(_sum_pixels(lax.square(x)) / count - lax.square(mean), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@functools.partial(jax.jit, static_argnums=(3, 4))  # norms of equal shapes are traced once
def _normalise(x, scale, bias, epsilon, activation):
    """(activation of the normalised x, batch mean, batch variance); no gradient flows through these two."""
    mean, var = _moments(x)
    factor = scale * lax.rsqrt(var + epsilon)
    y = x.astype(mean.dtype) * _wide(factor) + _wide(bias - mean * factor)
    return ACTIVATIONS[activation](y).astype(x.dtype), mean, var


def _normalise_forward(x, scale, bias, epsilon, activation):
    y, mean, var = _normalise(x, scale, bias, epsilon, activation)  # pyright: ignore[reportGeneralTypeIssues]
    return (y, mean, var), (x, scale, bias, mean, var)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalise_backward(epsilon, activation, residuals, gradients):
    x, scale, bias, mean, var = residuals
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    inverse = lax.rsqrt(var + epsilon)
    centred = (x.astype(dtype) - _wide(mean)) * _wide(inverse)
    # Recomputing the activation's input from x is cheaper than keeping it.
    gradient = _SLOPES[activation](centred * _wide(scale) + _wide(bias), gradients[0].astype(dtype))
    bias_gradient = _sum_pixels(gradient)
    scale_gradient = _sum_pixels(gradient * centred)
    count = x.size // x.shape[-1]
    through_moments = _wide(bias_gradient / count) + centred * _wide(scale_gradient / count)
    x_gradient = _wide(scale * inverse) * (gradient - through_moments)
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


_normalise.defvjp(_normalise_forward, _normalise_backward)


class PlainNorm(nn.Module):
    """The same as `Norm`, as a textbook writes it: `nn.BatchNorm`'s formula, then the activation."""

    activation: str
    features: int
    spec: Spec

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """[B, H, W, C] to the same; with batch statistics, the running ones move."""
        norm = nn.BatchNorm(
            use_running_average=use_running_average,
            momentum=self.spec.bn_decay,
            epsilon=self.spec.bn_epsilon,
            dtype=x.dtype,
        )
        # Sharing the scope keeps the variables at the same path as `Norm`'s.
        nn.share_scope(self, norm)
        return ACTIVATIONS[self.activation](norm(x))


def apply_norm(norm: nn.Module, conv: Callable[..., jax.Array], x: jax.Array, *, running: bool) -> jax.Array:
    """`norm`, a `Norm` or `PlainNorm`, of `conv`'s output; by the running statistics if `running`."""
    if isinstance(norm, Norm):
        return norm.fold(conv, x) if running else norm(conv(x))
    return norm(conv(x), use_running_average=running)  # pyright: ignore[reportCallIssue]


def keep_map(x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """What `apply_norm` takes for a convolution where there is none: x [B, H, W, C], times `factor` [C]."""
    return x if factor is None else x * _wide(factor).astype(x.dtype)


class ConvNorm(nn.Module):
    """Convolution (`conv`) of an `Op`, batch norm (`norm`) and activation where it has them."""

    op: Op
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """[B, H, W, C_in] to [B, H', W', C_out]."""
        conv = self.conv(op=self.op, name="conv")
        if not self.op.norm:
            return conv(x)
        norm = self.norm(activation=self.op.activation, features=self.op.filters, name="norm")
        return apply_norm(norm, conv, x, running=use_running_average)


class LayerScale(nn.Module):
    """A learned factor for each channel, near 0 at first: deep branches start as the identity (2103.17239 sec. 2)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        gamma = self.param("gamma", nn.initializers.constant(self.initial), x.shape[-1:])
        return x * _wide(gamma).astype(x.dtype)


class Dense(nn.Module):
    """Matrix product and bias on [B, C]; `kernel` is [C_in, C_out]."""

    filters: int
    spec: Spec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, C_in] to [B, filters]."""
        shape = (x.shape[-1], self.filters)
        kernel = self.param("kernel", make_kernel_init(self.path, self.spec), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None, :]


class SqueezeExcite(nn.Module):
    """Gate the channels of [B, H, W, C] by a two-layer function of their spatial means."""

    reduced: int
    gate: str
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same."""
        mean = spatial_mean(x)
        hidden = nn.relu(self.dense(filters=self.reduced, name="reduce")(mean))
        gates = GATES[self.gate](self.dense(filters=x.shape[-1], name="expand")(hidden))
        return x * gates[:, None, None, :]


def _average_pairs(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, H // 2, W // 2, C]: means of 2x2 pixels."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def _blur(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to half its size: every second pixel by 1-2-1 binomial weights, zeros outside (1904.11486)."""
    weights = jnp.array([1, 2, 1], x.dtype) / 4
    kernel = jnp.broadcast_to(jnp.outer(weights, weights)[:, :, None, None], (3, 3, 1, x.shape[-1]))
    return grouped_conv(x, kernel, stride=2, pads=((1, 1), (1, 1)), dilation=1)


ANTIALIASES: dict[str, Callable[[jax.Array], jax.Array]] = {"avg": _average_pairs, "blur": _blur}


def spatial_mean(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [B, C], summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def drop_path(branch: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero the residual branch of an image with probability `rate`, scale the others up (1603.09382)."""
    kept = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], 1, 1, 1))
    return jnp.where(kept, branch / (1 - rate), 0).astype(branch.dtype)
