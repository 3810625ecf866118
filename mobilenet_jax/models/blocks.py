"""The blocks of the tables: each module walks the ops of its row."""

from collections.abc import Callable

import jax
from flax import linen as nn

from mobilenet_jax.models.attention import attend
from mobilenet_jax.models.layers import (
    ACTIVATIONS,
    ANTIALIASES,
    ConvNorm,
    LayerScale,
    SqueezeExcite,
    apply_norm,
    drop_path,
    keep_map,
)
from mobilenet_jax.models.spec import (
    FusedInvertedResidual,
    InvertedResidual,
    MultiQueryAttention,
    Op,
    Residual,
    Row,
    UniversalInverted,
)

Wide = jax.Array | None


class Chain(nn.Module):
    """Ops one behind the other."""

    ops: tuple[Op, ...]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """[B, H, W, C] to what the last op makes of it."""
        for op in self.ops:
            layer = ConvNorm(op, self.conv, self.norm, name=op.name.split("/")[-1])
            x = layer(x, use_running_average=use_running_average)
        return x


class ResidualBlock(nn.Module):
    """What the blocks with a residual share; `branch` is each one's own.

    `wide` is the previous block's activated depthwise output where shortcuts join expansions (1801.04381 Fig.
    6b); an inverted residual returns its own beside its output.
    """

    row: Residual
    in_channels: int
    shortcut: str
    sum_activation: str
    drop_rate: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: jax.Array, wide: Wide, use_running_average: bool, deterministic: bool
    ) -> tuple[jax.Array, Wide]:
        """[B, H, W, in_channels] to [B, H', W', row.filters], and what the next block may join."""
        y, wide = self.branch(x, wide, use_running_average)
        if self.shortcut == "bottleneck" and self.row.has_residual(self.in_channels):
            if self.drop_rate and not deterministic:
                y = drop_path(y, self.drop_rate, self.make_rng("dropout"))
            y = ACTIVATIONS[self.sum_activation](x + y)
        return y, wide if self.shortcut == "expansion" else None

    def branch(self, x: jax.Array, wide: Wide, running: bool) -> tuple[jax.Array, Wide]:
        """The block without its residual; with `running`, norms use their running statistics."""
        raise NotImplementedError

    def run(self, name: str, x: jax.Array, running: bool) -> jax.Array:
        """The op called `name`, or those called `name/...` one behind the other."""
        ops = tuple(op for op in self.row.ops(self.in_channels) if op.name.split("/")[0] == name)  # pyright: ignore[reportAttributeAccessIssue]
        if ops[0].scale:
            return LayerScale(ops[0].scale, name=name)(x)
        if ops[0].antialias:
            return ANTIALIASES[ops[0].antialias](x)
        if ops[0].name == name:
            return ConvNorm(ops[0], self.conv, self.norm, name=name)(x, use_running_average=running)
        return Chain(ops, self.conv, self.norm, name=name)(x, running)


class InvertedResidualBlock(ResidualBlock):
    """V2 and V3: expand, depthwise, squeeze-excite, project."""

    row: InvertedResidual

    def branch(self, x: jax.Array, wide: Wide, running: bool) -> tuple[jax.Array, Wide]:
        """Projected map, and the activated depthwise output."""
        if self.row.expands:
            x = self.run("expand", x, running)
            if self.shortcut == "expansion" and wide is not None and wide.shape == x.shape:
                x = x + wide
        x = wide = self.run("depthwise", x, running)
        if se := self.row.se:
            x = SqueezeExcite(se.channels(self.row.expanded), se.gate, self.dense, name="se")(x)
        return self.run("project", x, running), wide


class BottleneckBlock(ResidualBlock):
    """V4's universal inverted bottleneck and the fused one: all ops of the row, one behind the other."""

    row: FusedInvertedResidual | UniversalInverted

    def branch(self, x: jax.Array, wide: Wide, running: bool) -> tuple[jax.Array, Wide]:
        """Projected map; nothing to join."""
        for name in dict.fromkeys(op.name.split("/")[0] for op in self.row.ops(self.in_channels)):
            x = self.run(name, x, running)
        return x, None


class AttentionBlock(ResidualBlock):
    """V4's mobile attention: norm, query, key and value, attention, output."""

    row: MultiQueryAttention

    def branch(self, x: jax.Array, wide: Wide, running: bool) -> tuple[jax.Array, Wide]:
        """The output's projection; nothing to join."""
        norm = self.norm(activation="linear", features=self.in_channels, name="norm")
        x = apply_norm(norm, keep_map, x, running=running)
        query, key, value = (self.run(name, x, running) for name in ("query", "key", "value"))
        x = self.run("output", attend(query, key, value, heads=self.row.heads), running)
        return self.run("layer_scale", x, running) if self.row.layer_scale else x, None


RESIDUAL_BLOCKS: dict[type[Row], type[ResidualBlock]] = {
    InvertedResidual: InvertedResidualBlock,
    FusedInvertedResidual: BottleneckBlock,
    UniversalInverted: BottleneckBlock,
    MultiQueryAttention: AttentionBlock,
}
