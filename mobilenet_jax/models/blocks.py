"""The blocks of the tables: each module walks the ops of its row."""

from collections.abc import Callable

import jax
from flax import linen as nn

from mobilenet_jax.models.layers import ConvNorm, SqueezeExcite, drop_path
from mobilenet_jax.models.spec import InvertedResidual, Row, Separable

Wide = jax.Array | None


class SeparableBlock(nn.Module):
    """V1: depthwise, pointwise."""

    row: Separable
    in_channels: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """[B, H, W, in_channels] to [B, H', W', row.filters]."""
        for op in self.row.ops(self.in_channels):
            layer = ConvNorm(op, self.conv, self.norm, name=op.name)
            x = layer(x, use_running_average=use_running_average)
        return x


class InvertedResidualBlock(nn.Module):
    """V2 and V3: expand, depthwise, squeeze-excite, project, and a residual where the row has one.

    `wide` is the previous block's activated depthwise output where shortcuts join expansions (1801.04381 Fig.
    6b); the block returns its own beside its output.
    """

    row: InvertedResidual
    in_channels: int
    shortcut: str
    drop_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: jax.Array, wide: Wide, use_running_average: bool, deterministic: bool
    ) -> tuple[jax.Array, Wide]:
        """[B, H, W, in_channels] to [B, H', W', row.filters], and what the next block may join."""
        ops = {op.name: op for op in self.row.ops(self.in_channels)}

        def run(name: str, x: jax.Array) -> jax.Array:
            layer = ConvNorm(ops[name], self.conv, self.norm, name=name)
            return layer(x, use_running_average=use_running_average)

        y = x
        if self.row.expands:
            y = run("expand", y)
            if self.shortcut == "expansion" and wide is not None and wide.shape == y.shape:
                y = y + wide
        y = wide = run("depthwise", y)
        if self.row.se:
            y = SqueezeExcite(ops["se/reduce"].filters, self.row.se.gate, self.dense, name="se")(y)
        y = run("project", y)
        if self.shortcut == "bottleneck" and self.row.has_residual(self.in_channels):
            if self.drop_rate and not deterministic:
                y = drop_path(y, self.drop_rate, self.make_rng("dropout"))
            y = x + y
        return y, wide if self.shortcut == "expansion" else None


BLOCKS: dict[type[Row], type[nn.Module]] = {
    Separable: SeparableBlock,
    InvertedResidual: InvertedResidualBlock,
}
