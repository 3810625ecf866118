"""The one network that walks every table: stem, blocks, head, pooling, hidden layer, classifier."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from mobilenet_jax.models.activations import ACTIVATIONS
from mobilenet_jax.models.blocks import Chain, ResidualBlock
from mobilenet_jax.models.cpu import IMPLEMENTATIONS
from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.layers import LOWERINGS, Conv, ConvNorm, Dense, Layers, Norm, PlainNorm, spatial_mean
from mobilenet_jax.models.ops import DenseOp, PooledConvOp
from mobilenet_jax.models.spec import Conv as ConvRow
from mobilenet_jax.models.spec import Separable, Spec, check_choice
from mobilenet_jax.models.zoo import make_spec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
PRECISIONS = ("default", "high", "highest")


def check_images(images: jax.Array, spec: Spec) -> None:
    """Raise ValueError, in one sentence, unless images are floats [B, H, W, C] with the channels of the network."""
    if images.ndim != 4 or images.shape[-1] != spec.in_channels or images.shape[0] == 0:
        raise ValueError(
            f"images are {images.shape}; valid: [batch, height, width, {spec.in_channels}] with a batch of 1 or more"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}; valid: floats that are normalised as the weights expect, (images - mean) / "
            'std, with the mean and std of card["preprocessing"] (load_weights returns the card)'
        )


def check_variables(variables: Mapping[str, Any], spec: Spec) -> None:
    """Raise ValueError, in one sentence, if a variable of the network has another shape or a parameter is missing."""
    given: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(nn.meta.unbox(dict(variables))))
    for path, shape in variable_shapes(spec).items():
        name = "/".join(path)
        if path not in given and path[0] == "params":
            problem = f"have no {name}"
        elif path in given and jnp.shape(given[path]) != shape:
            problem = f"have {name} of {jnp.shape(given[path])} where the network has {shape}"
        else:
            continue
        raise ValueError(
            f"the variables {problem}; valid: variables of a {spec.name} with the same width, classes and options"
        )


class MobileNet(nn.Module):
    """A `Spec` as a module.

    `lowering` "auto" runs the fast forms of convolution and batch norm on a CPU (`cpu.py`), "plain" the forms of a
    textbook; parameters and numbers are the same. `precision` is for convolutions and matrix products in float32.
    "default" is the setting of `jax.default_matmul_precision`: unless it is changed, a TPU rounds their inputs to
    bfloat16 and a new GPU to TF32. "highest" rounds nothing, and "high" is between them. A CPU never rounds. `remat`
    computes blocks again in the backward pass to save memory. With `freeze_stats`, batch norm uses its running
    statistics in training too.
    """

    spec: Spec
    dtype: str = "float32"
    lowering: str = "auto"
    depthwise_impl: str = "auto"
    precision: str = "default"
    remat: bool = False
    freeze_stats: bool = False

    def __post_init__(self):
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("lowering", self.lowering, LOWERINGS)
        check_choice("depthwise_impl", self.depthwise_impl, IMPLEMENTATIONS)
        check_choice("precision", self.precision, PRECISIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: tuple[str, ...] = ()) -> Any:
        """Return the logits [B, num_classes] in float32 of normalised images [B, H, W, C].

        With num_classes=0, returns the vector that a classifier would see. With `features`, names of `spec.taps()`,
        returns a pair: the logits, and a dict of the maps by name. Training mode updates `batch_stats` (make them
        mutable) and draws from the key "dropout". Raises ValueError for images of another shape, for images that are
        integers, for unknown feature names, and for variables of another network. Raises TypeError for forward-mode
        derivatives unless `lowering` is "plain".
        """
        check_images(images, self.spec)
        if isinstance(features, str):
            raise ValueError(f"features is {features!r}; valid: a tuple of names: features=({features!r},)")
        taps = self.spec.taps()
        for name in features:
            check_choice("feature", name, tuple(taps))
        if not self.is_initializing():
            check_variables(self.variables, self.spec)
        precise = self.precision != "default"
        with jax.default_matmul_precision(self.precision) if precise else contextlib.nullcontext():
            try:
                maps, logits = self._run(images, train=train)
            except TypeError as error:
                if self.lowering == "auto" and "custom_vjp" in str(error) and "forward-mode" in str(error):
                    raise TypeError(
                        "forward-mode derivatives (jvp, jacfwd, hessian, linearize) need lowering='plain': "
                        "create_model(..., lowering='plain') takes the same variables"
                    ) from error
                raise
        return (logits, {name: maps[taps[name]] for name in features}) if features else logits

    def _run(self, images: jax.Array, *, train: bool) -> tuple[dict[str, jax.Array], jax.Array]:
        """Return the output of every row by its name, and the logits."""
        spec = self.spec
        layers, running = self._layers(), not train or self.freeze_stats
        maps, x, wide = {}, images, None
        for i, (name, row, channels) in enumerate(spec.rows()):
            ops = row.ops(channels)
            ops[0].output_size(x.shape[1], x.shape[2], spec.padding)  # raises ValueError if the image is too small
            if isinstance(row, ConvRow):
                x = ConvNorm(row.ops(channels)[0], layers, name=name)(x, use_running_average=running)
            elif isinstance(row, Separable):
                x = self._remat(Chain, (2,))(row.ops(channels), layers, name=name)(x, running)
            else:
                rate = spec.drop_path * (1 if spec.drop_path_flat else i / len(spec.blocks))
                block = self._remat(ResidualBlock, (3, 4))(
                    row, channels, spec.shortcut, spec.sum_activation, rate, layers, name=name
                )
                x, wide = block(x, wide, running, not train)
            maps[name] = x
        return maps, self._classify(self._pool(x, layers, running=running), train=train)

    def _layers(self) -> Layers:
        dtype = DTYPES[self.dtype]
        conv = functools.partial(
            Conv, spec=self.spec, dtype=dtype, lowering=self.lowering, depthwise_impl=self.depthwise_impl
        )
        norm = functools.partial(Norm if self.lowering == "auto" else PlainNorm, spec=self.spec)
        return Layers(conv, norm, functools.partial(Dense, spec=self.spec, dtype=dtype))

    def _remat(self, block: type[nn.Module], static: tuple[int, ...]) -> Callable[..., nn.Module]:
        return nn.remat(block, static_argnums=static) if self.remat else block

    def _pool(self, x: jax.Array, layers: Layers, *, running: bool) -> jax.Array:
        """[B, H, W, C] to the vector [B, D] that the classifier sees: spatial mean, hidden layer."""
        x = spatial_mean(x)
        match self.spec.hidden_op():
            case PooledConvOp() as op:
                hidden = ConvNorm(op, layers, name=op.name)
                return hidden(x[:, None, None, :], use_running_average=running)[:, 0, 0, :]
            case DenseOp() as op:
                return ACTIVATIONS[op.activation](layers.dense(op=op, name=op.name)(x))
        return x

    def _classify(self, x: jax.Array, *, train: bool) -> jax.Array:
        # Logits, or the vector without a classifier, are float32 whatever dtype the network computes in.
        wide_dtype = jnp.promote_types(x.dtype, jnp.float32)
        x = x.astype(wide_dtype)
        op = self.spec.classifier_op()
        if op is None:
            return x
        x = nn.Dropout(self.spec.dropout, deterministic=not train)(x)
        return Dense(op, self.spec, wide_dtype, name=op.name)(x)


def create_model(
    name: str,
    *,
    width: float = 1.0,
    num_classes: int = 1000,
    convention: str = "keras",
    dtype: str = "float32",
    lowering: str = "auto",
    depthwise_impl: str = "auto",
    precision: str = "default",
    remat: bool = False,
    freeze_stats: bool = False,
    **options: object,
) -> MobileNet:
    """Return the module `name` (see `zoo.MODELS`) at a width, as the framework of `convention` builds it.

    Args:
      name: a key of `zoo.MODELS`.
      width: width multiplier, by the rule of the model's paper and convention.
      num_classes: 0 builds no classifier.
      convention: one of `zoo.CONVENTIONS`; sets padding, epsilon, width rule and head.
      dtype: of the computation; parameters, statistics and logits are float32.
      lowering, depthwise_impl, precision, remat, freeze_stats: see `MobileNet`.
      **options: keys of `options.OPTIONS`, which lists and documents them; None leaves the table as it is.

    Raises:
      ValueError: an unknown name or an impossible value, in one sentence with the valid values.
    """
    spec = make_spec(name, width=width, num_classes=num_classes, convention=convention, **options)
    return MobileNet(
        spec,
        dtype=dtype,
        lowering=lowering,
        depthwise_impl=depthwise_impl,
        precision=precision,
        remat=remat,
        freeze_stats=freeze_stats,
    )
