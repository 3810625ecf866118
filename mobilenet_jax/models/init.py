"""Initial values: one rule for the scale of every kernel, drawn by linen or, faster, by NumPy."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mobilenet_jax.models.spec import Op, Spec

_ATTENTION = {"query", "key", "value", "output"}


def kernel_stddev(path: Sequence[str], shape: Sequence[int], spec: Spec, groups: int = 1) -> float:
    """Standard deviation of the normal that a kernel is drawn from; `slim` cuts it at two of them.

    `he` is normal with variance 2 / (k*k*C_out/groups): k*k alone for a depthwise kernel [k, k, 1, C], where
    a fan-out of k*k*C would be sqrt(C) too small; the classifier has .01 (torchvision/models/mobilenetv2.py;
    timm `_efficientnet_builder.py`). Attention's kernels are uniform, with variance 2 / (k*k * (C_in/groups + C_out))
    (timm `attention2d.py: init_weights`). `slim` is .09, V3 .008 (tensorflow/models slim `mobilenet_v1.py`, README
    of V3).
    """
    if spec.init == "slim":
        return spec.slim_stddev
    if path[0] == "classifier":
        return 0.01
    area = math.prod(shape[:-2])
    if _ATTENTION.intersection(path):
        return math.sqrt(2 / (area * (shape[-2] + shape[-1])))
    return math.sqrt(2 / (area * shape[-1] // groups))


def make_kernel_init(path: Sequence[str], spec: Spec, groups: int = 1) -> Callable:
    """A linen initialiser for the kernel at `path`, of a convolution in `groups` channel groups."""

    def kernel_init(key, shape, dtype=jnp.float32):
        stddev = kernel_stddev(path, shape, spec, groups)
        if spec.init == "slim":
            return stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)
        if _ATTENTION.intersection(path):
            return stddev * jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3))
        return stddev * jax.random.normal(key, shape, dtype)

    return kernel_init


def _draw(path: tuple[str, ...], shape: tuple[int, ...], op: Op, spec: Spec, seed: int) -> np.ndarray:
    leaf = path[-1]
    if leaf in ("scale", "var"):
        return np.ones(shape, np.float32)
    if leaf in ("bias", "mean"):
        return np.zeros(shape, np.float32)
    if leaf == "gamma":
        return np.full(shape, op.scale, np.float32)
    # A generator of its own a leaf: values do not depend on the order, nor on which other layers there are.
    generator = np.random.default_rng((seed, zlib.crc32("/".join(path).encode())))
    if spec.init != "slim" and _ATTENTION.intersection(path):
        values = generator.uniform(-math.sqrt(3), math.sqrt(3), shape).astype(np.float32)
    else:
        values = generator.standard_normal(shape, np.float32)
    if spec.init == "slim":
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
    return values * np.float32(kernel_stddev(path[1:], shape, spec, op.groups))


def _list_variables(spec: Spec) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], Op]]:
    """(path, shape, op) of every variable."""
    ops = [((name, *filter(None, op.name.split("/"))), op) for name, row, n in spec.rows() for op in row.ops(n)]
    ops += [((op.name,), op) for op in spec.tail_ops()]
    for path, op in ops:
        if op.bias:
            yield ("params", *path, "kernel"), (op.in_channels, op.filters), op
            yield ("params", *path, "bias"), (op.filters,), op
        elif op.kernel:
            kernel = (op.kernel, op.kernel, op.in_channels // op.groups, op.filters)
            yield ("params", *path, "conv", "kernel"), kernel, op
        if op.scale:
            yield ("params", *path, "gamma"), (op.filters,), op
        if op.norm:
            norm = (*path, "norm") if op.kernel else path
            for collection, leaves in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var"))):
                for leaf in leaves:
                    yield (collection, *norm, leaf), (op.filters,), op


def variable_shapes(spec: Spec) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The path and shape of every variable of the network, by arithmetic: what `jax.eval_shape` finds in seconds."""
    return {path: shape for path, shape, _ in _list_variables(spec)}


def init_variables(model: nn.Module, *, seed: int) -> dict:
    """Variables of `model` with the distributions of `model.init`, as NumPy arrays in float32.

    `jax.jit(model.init)` spends 10 to 20 s compiling a generator for each kernel; NumPy draws the values in a fraction
    of a second. They depend on the seed and the paths alone.
    """
    spec: Spec = model.spec  # pyright: ignore[reportAttributeAccessIssue]
    leaves = {path: _draw(path, shape, op, spec, seed) for path, shape, op in _list_variables(spec)}
    return traverse_util.unflatten_dict(leaves)
