"""The layers of a network in plain Flax: convolution, batch norm, dense, squeeze-excite.

With `lowering="plain"` they are the textbook forms. With "auto", convolution and batch norm call the fast forms of
`cpu.py` and `cpu_norm.py`, and at inference batch norm folds into the convolution's kernel. Variables and numbers are
the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mobilenet_jax.models import cpu, cpu_norm
from mobilenet_jax.models.activations import ACTIVATIONS, GATES
from mobilenet_jax.models.init import make_kernel_init
from mobilenet_jax.models.ops import ConvOp, DenseOp, DepthwiseOp, LayerScaleOp, SqueezeExciteOp
from mobilenet_jax.models.spec import Spec

LOWERINGS = ("auto", "plain")


class Layers(NamedTuple):
    """Functions that make modules; the settings that a whole network shares are bound to them."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]


class Conv(nn.Module):
    """The convolution of an op, without bias."""

    op: ConvOp
    spec: Spec
    dtype: jnp.dtype
    lowering: str
    depthwise_impl: str

    @nn.compact
    def __call__(self, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C_in] to [B, H', W', C_out], padded by the spec's rule; `factor` [C_out] scales the outputs."""
        op = self.op
        kernel = self.param("kernel", make_kernel_init(op, self.spec), op.kernel_shape)
        if factor is not None:
            kernel = kernel * _wide(factor)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        pads = op.pads(x.shape[1], x.shape[2], self.spec.padding)
        if self.lowering == "auto" and isinstance(op, DepthwiseOp):
            return cpu.depthwise_conv(
                x, kernel, stride=op.stride, pads=pads, dilation=op.dilation, impl=self.depthwise_impl
            )
        conv = cpu.full_conv if self.lowering == "auto" else cpu.plain_conv
        return conv(x, kernel, stride=op.stride, pads=pads, dilation=op.dilation, groups=op.groups)


def _wide(channels):
    """Give [C] the rank of a map [B, H, W, C]."""
    return channels[None, None, None, :]


class Norm(nn.Module):
    """Batch norm and activation (`cpu_norm.normalise`), with the variables of `nn.BatchNorm`.

    Statistics are float32 for every dtype of the map. They are over the batch that the function sees: the global batch
    under `jit`, a device's share under `shard_map`.
    """

    activation: str
    features: int
    spec: Spec

    def setup(self) -> None:
        """Create the variables, which all methods share."""
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [B, H, W, C] by the batch's statistics, and update the running statistics."""
        y, mean, var = cpu_norm.normalise(x, self.scale, self.bias, self.spec.bn_epsilon, self.activation)  # pyright: ignore[reportGeneralTypeIssues]
        if not self.is_initializing():
            keep = self.spec.bn_decay
            self.mean.value = keep * self.mean.value + (1 - keep) * lax.stop_gradient(mean)
            self.var.value = keep * self.var.value + (1 - keep) * lax.stop_gradient(var)
        return y

    def factor(self) -> jax.Array:
        """Return the factors [C] by which the running statistics scale a map; a convolution's kernel can hold them."""
        return self.scale * lax.rsqrt(self.var.value + self.spec.bn_epsilon)

    def finish(self, y: jax.Array, factor: jax.Array) -> jax.Array:
        """Return the normalised and activated map of y, which `factor` has scaled already.

        The shift is added in float32: a bfloat16 shift would lose a part of a small difference of large numbers.
        """
        shift = self.bias - self.mean.value * factor
        return ACTIVATIONS[self.activation]((y + _wide(shift)).astype(y.dtype))


class PlainNorm(nn.Module):
    """Batch norm and activation as a textbook writes them, with the variables of `Norm`."""

    activation: str
    features: int
    spec: Spec

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """Normalise [B, H, W, C]; by the batch's statistics, also update the running statistics."""
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
    """Return the `Norm` or `PlainNorm` of `conv(x)`; `running` says that it uses the running statistics."""
    if not isinstance(norm, Norm):
        return norm(conv(x), use_running_average=running)  # pyright: ignore[reportCallIssue]
    if not running:
        return norm(conv(x))
    factor = norm.factor()
    return norm.finish(conv(x, factor), factor)


def keep_map(x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """Return x [B, H, W, C] times `factor` [C]: the `conv` of `apply_norm` for a norm without a convolution."""
    return x if factor is None else x * _wide(factor).astype(x.dtype)


class ConvNorm(nn.Module):
    """The convolution of an op, then its batch norm if it has one, and its activation."""

    op: ConvOp
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """[B, H, W, C_in] to [B, H', W', C_out]."""
        conv = self.layers.conv(op=self.op, name="conv")
        if not self.op.norm:
            return conv(x)
        norm = self.layers.norm(activation=self.op.activation, features=self.op.filters, name="norm")
        return apply_norm(norm, conv, x, running=use_running_average)


class LayerScale(nn.Module):
    """A learned factor for each channel, near 0 at first: deep branches start as the identity (2103.17239 sec. 2)."""

    op: LayerScaleOp

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        gamma = self.param("gamma", nn.initializers.constant(self.op.initial), (self.op.filters,))
        return x * _wide(gamma).astype(x.dtype)


class Dense(nn.Module):
    """Matrix product and bias of an op on [B, C]; the activation is left to the caller."""

    op: DenseOp
    spec: Spec
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, C_in] to [B, filters]."""
        kernel = self.param("kernel", make_kernel_init(self.op, self.spec), self.op.kernel_shape)
        bias = self.param("bias", nn.initializers.zeros, (self.op.filters,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None, :]


class SqueezeExcite(nn.Module):
    """Gate the channels of a map by a two-layer function of their spatial means (1905.02244, sec. 5.3)."""

    op: SqueezeExciteOp
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        mean = spatial_mean(x)
        hidden = nn.relu(self.layers.dense(op=self.op.reduce, name="reduce")(mean))
        gates = GATES[self.op.gate](self.layers.dense(op=self.op.expand, name="expand")(hidden))
        return x * gates[:, None, None, :]


def average_pairs(x: jax.Array) -> jax.Array:
    """Average 2x2 pixels: [B, H, W, C] to [B, H // 2, W // 2, C]."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def _blur(x: jax.Array) -> jax.Array:
    """Blur every second pixel of [B, H, W, C] by 1-2-1 binomial weights, with zeros outside (1904.11486)."""
    weights = jnp.array([1, 2, 1], x.dtype) / 4
    kernel = jnp.broadcast_to(jnp.outer(weights, weights)[:, :, None, None], (3, 3, 1, x.shape[-1]))
    return cpu.plain_conv(x, kernel, stride=2, pads=((1, 1), (1, 1)), groups=x.shape[-1])


ANTIALIASES: dict[str, Callable[[jax.Array], jax.Array]] = {"avg": average_pairs, "blur": _blur}


def normalise_images(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Return (images - mean) / std in float32, for images uint8 [B, H, W, C]; mean and std are in grey levels."""
    mean_array, std_array = (jnp.array(grey_levels)[None, None, None, :] for grey_levels in (mean, std))
    return (images.astype(jnp.float32) - mean_array) / std_array


def spatial_mean(x: jax.Array) -> jax.Array:
    """Average over the pixels: [B, H, W, C] to [B, C], summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def drop_path(branch: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero an image's residual branch with probability `rate`, and scale the others up (1603.09382)."""
    kept = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], 1, 1, 1))
    return jnp.where(kept, branch / (1 - rate), 0).astype(branch.dtype)
