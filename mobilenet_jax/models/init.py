"""Initial values: one rule for the scale of every kernel, drawn by linen or, faster, by NumPy."""

import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mobilenet_jax.models.ops import ConvOp, DenseOp, LayerScaleOp, Op
from mobilenet_jax.models.spec import Spec


def kernel_stddev(op: ConvOp | DenseOp, spec: Spec) -> float:
    """Return the standard deviation of the distribution that the op's kernel is drawn from.

    With `spec.init` "he" it depends on the op's `distribution`:
      he: normal with variance 2 / (k*k*C_out/groups). That is k*k alone for a depthwise kernel [k, k, 1, C], where a
        fan-out of k*k*C would make it sqrt(C) too small (torchvision/models/mobilenetv2.py; timm
        `_efficientnet_builder.py`).
      small: normal with .01, the classifier (torchvision/models/mobilenetv2.py).
      glorot: uniform with variance 2 / (k*k * (C_in/groups + C_out)), attention (timm `attention2d.py: init_weights`).
    With "slim" it is .09, in V3 .008 (tensorflow/models slim `mobilenet_v1.py`, README of V3), for a normal that is
    cut at two of them.
    """
    if spec.init == "slim":
        return spec.slim_stddev
    if op.distribution == "small":
        return 0.01
    *sides, inputs, outputs = op.kernel_shape
    area = math.prod(sides)
    if op.distribution == "glorot":
        return math.sqrt(2 / (area * (inputs + outputs)))
    groups = op.groups if isinstance(op, ConvOp) else 1
    return math.sqrt(2 / (area * outputs // groups))


def _is_uniform(op: ConvOp | DenseOp, spec: Spec) -> bool:
    return spec.init != "slim" and op.distribution == "glorot"


def make_kernel_init(op: ConvOp | DenseOp, spec: Spec) -> Callable:
    """Return a linen initialiser for the op's kernel."""

    def kernel_init(key, shape, dtype=jnp.float32):
        stddev = kernel_stddev(op, spec)
        if spec.init == "slim":
            return stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)
        if _is_uniform(op, spec):
            return stddev * jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3))
        return stddev * jax.random.normal(key, shape, dtype)

    return kernel_init


def _draw_kernel(op: ConvOp | DenseOp, spec: Spec, generator: np.random.Generator) -> np.ndarray:
    shape = op.kernel_shape
    if _is_uniform(op, spec):
        values = generator.uniform(-math.sqrt(3), math.sqrt(3), shape).astype(np.float32)
    else:
        values = generator.standard_normal(shape, np.float32)
    if spec.init == "slim":
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
    return values * np.float32(kernel_stddev(op, spec))


def _draw(path: tuple[str, ...], shape: tuple[int, ...], op: Op, spec: Spec, seed: int) -> np.ndarray:
    if isinstance(op, ConvOp | DenseOp) and path[-1] == "kernel":
        # Each leaf has its own generator, so its values depend neither on the order nor on which other layers exist.
        return _draw_kernel(op, spec, np.random.default_rng((seed, zlib.crc32("/".join(path).encode()))))
    if isinstance(op, LayerScaleOp):
        return np.full(shape, op.initial, np.float32)
    return np.full(shape, 1 if path[-1] in ("scale", "var") else 0, np.float32)


def _list_variables(spec: Spec) -> dict[tuple[str, ...], tuple[tuple[int, ...], Op]]:
    """Return (shape, op) of every variable by its path."""
    found = {}
    for path, op in spec.layers():
        for leaf, shape in op.shapes().items():
            collection = "batch_stats" if leaf.endswith(("mean", "var")) else "params"
            found[collection, *path.split("/"), *leaf.split("/")] = shape, op
    return found


def variable_shapes(spec: Spec) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of every variable by its path: by arithmetic at once, where `jax.eval_shape` takes seconds."""
    return {path: shape for path, (shape, _) in _list_variables(spec).items()}


def init_variables(model: nn.Module, *, seed: int) -> dict:
    """Return variables of `model` with the distributions of `model.init`, as NumPy arrays in float32.

    `jax.jit(model.init)` spends 10 to 20 s compiling a generator for each kernel; NumPy draws the values in a fraction
    of a second. They depend on the seed and the paths alone.
    """
    spec: Spec = model.spec  # pyright: ignore[reportAttributeAccessIssue]
    leaves = {path: _draw(path, shape, op, spec, seed) for path, (shape, op) in _list_variables(spec).items()}
    return traverse_util.unflatten_dict(leaves)
