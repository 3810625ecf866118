"""The blocks of the tables: a module runs the ops of its row one behind the other, and adds the residual.

The layers of a block and their order stand in its row (`spec.py`). `run_op` builds the module for each type of op.
"""

import jax
from flax import linen as nn

from mobilenet_jax.models.activations import ACTIVATIONS
from mobilenet_jax.models.attention import attend
from mobilenet_jax.models.layers import (
    ANTIALIASES,
    ConvNorm,
    Layers,
    LayerScale,
    SqueezeExcite,
    apply_norm,
    drop_path,
    keep_map,
)
from mobilenet_jax.models.ops import (
    AntialiasOp,
    AttentionOp,
    ConvOp,
    DepthwiseOp,
    LayerScaleOp,
    NormOp,
    Op,
    SqueezeExciteOp,
)
from mobilenet_jax.models.spec import InvertedResidual, Residual


class Chain(nn.Module):
    """Convolutions one behind the other, each under the last part of its name."""

    ops: tuple[ConvOp, ...]
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """[B, H, W, C] to the output of the last convolution."""
        for op in self.ops:
            layer = ConvNorm(op, self.layers, name=op.name.split("/")[-1])
            x = layer(x, use_running_average=use_running_average)
        return x


def run_op(op: Op, layers: Layers, x: jax.Array, *, running: bool) -> jax.Array:
    """Build the module of an op inside the calling module, and return its output of x.

    With `running`, norms use their running statistics.
    """
    match op:
        case ConvOp():
            folder, _, leaf = op.name.rpartition("/")
            if folder:
                return Chain((op,), layers, name=folder)(x, running)
            return ConvNorm(op, layers, name=leaf)(x, use_running_average=running)
        case SqueezeExciteOp():
            return SqueezeExcite(op, layers, name=op.name)(x)
        case AntialiasOp():
            return ANTIALIASES[op.antialias](x)
        case LayerScaleOp():
            return LayerScale(op, name=op.name)(x)
        case NormOp():
            norm = layers.norm(activation="linear", features=op.filters, name=op.name)
            return apply_norm(norm, keep_map, x, running=running)
        case AttentionOp():
            query = Chain(op.query, layers, name="query")(x, running)
            key = Chain(op.key, layers, name="key")(x, running)
            value = Chain(op.value, layers, name="value")(x, running)
            return attend(query, key, value, heads=op.heads)
    raise TypeError(f"{type(op).__name__} is no op of a block")


class ResidualBlock(nn.Module):
    """The ops of a row and, where its shape allows one, the residual around them."""

    row: Residual
    in_channels: int
    shortcut: str
    sum_activation: str
    drop_rate: float
    layers: Layers

    @nn.compact
    def __call__(
        self, x: jax.Array, wide: jax.Array | None, use_running_average: bool, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, H, W, in_channels] to [B, H', W', row.filters], and the map that the next block may join.

        If shortcuts join expansions (1801.04381 Fig. 6b), `wide` is the previous block's activated depthwise output,
        and an inverted residual returns its own.
        """
        y, wide = self._branch(x, wide if self.shortcut == "expansion" else None, running=use_running_average)
        if self.shortcut == "bottleneck" and self.row.has_residual(self.in_channels):
            if self.drop_rate and not deterministic:
                y = drop_path(y, self.drop_rate, self.make_rng("dropout"))
            y = ACTIVATIONS[self.sum_activation](x + y)
        return y, wide if self.shortcut == "expansion" else None

    def _branch(self, x: jax.Array, wide: jax.Array | None, *, running: bool) -> tuple[jax.Array, jax.Array | None]:
        """Run the row's ops; return their output and the activated depthwise output of an inverted residual."""
        is_inverted, joined = isinstance(self.row, InvertedResidual), None
        for op in self.row.ops(self.in_channels):
            joins = is_inverted and isinstance(op, DepthwiseOp)
            if joins and self.row.expands and wide is not None and wide.shape == x.shape:  # pyright: ignore[reportAttributeAccessIssue]
                x = x + wide
            x = run_op(op, self.layers, x, running=running)
            if joins:
                joined = x
        return x, joined
