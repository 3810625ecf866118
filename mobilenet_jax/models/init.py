"""Initial values: one rule for the scale of every kernel, drawn by linen or, faster, by NumPy."""

import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mobilenet_jax.models.spec import Spec


def kernel_stddev(path: Sequence[str], shape: Sequence[int], spec: Spec) -> float:
    """Standard deviation of the normal that a kernel is drawn from; `slim` cuts it at two of them.

    `he` is normal with variance 2 / (k*k*C_out/groups): k*k alone for a depthwise kernel [k, k, 1, C], where
    a fan-out of k*k*C would be sqrt(C) too small; the classifier has .01 (torchvision/models/mobilenetv2.py;
    timm `_efficientnet_builder.py`). `slim` is .09, V3 .008 (tensorflow/models slim `mobilenet_v1.py`, README
    of V3).
    """
    if spec.init == "slim":
        return spec.slim_stddev
    if path[0] == "classifier":
        return 0.01
    area = math.prod(shape[:-2])
    return math.sqrt(2 / (area if "depthwise" in path else area * shape[-1]))


def make_kernel_init(path: Sequence[str], spec: Spec) -> Callable:
    """A linen initialiser for the kernel at `path`."""

    def kernel_init(key, shape, dtype=jnp.float32):
        stddev = kernel_stddev(path, shape, spec)
        if spec.init == "slim":
            return stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)
        return stddev * jax.random.normal(key, shape, dtype)

    return kernel_init


def _draw(path: tuple[str, ...], shape: tuple[int, ...], spec: Spec, seed: int) -> np.ndarray:
    leaf = path[-1]
    if leaf in ("scale", "var"):
        return np.ones(shape, np.float32)
    if leaf in ("bias", "mean"):
        return np.zeros(shape, np.float32)
    # A generator of its own a leaf: values do not depend on the order, nor on which other layers there are.
    generator = np.random.default_rng((seed, zlib.crc32("/".join(path).encode())))
    values = generator.standard_normal(shape, np.float32)
    if spec.init == "slim":
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(int(outside.sum()), np.float32)
    return values * np.float32(kernel_stddev(path[1:], shape, spec))


def variable_shapes(spec: Spec) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The path and shape of every variable of the network, by arithmetic: what `jax.eval_shape` finds in seconds."""
    ops = [((name, *filter(None, op.name.split("/"))), op) for name, row, n in spec.rows() for op in row.ops(n)]
    ops += [((op.name,), op) for op in spec.tail_ops()]
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for path, op in ops:
        if not op.norm:
            shapes["params", *path, "kernel"] = (op.in_channels, op.filters)
            shapes["params", *path, "bias"] = (op.filters,)
            continue
        kernel = (op.kernel, op.kernel, op.in_channels // op.groups, op.filters)
        shapes["params", *path, "conv", "kernel"] = kernel
        for collection, leaf in (
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        ):
            shapes[collection, *path, "norm", leaf] = (op.filters,)
    return shapes


def init_variables(model: nn.Module, *, seed: int) -> dict:
    """Variables of `model` with the distributions of `model.init`, as NumPy arrays in float32.

    `jax.jit(model.init)` spends 10 to 20 s compiling a generator for each kernel; NumPy draws the values in a fraction
    of a second. They depend on the seed and the paths alone.
    """
    spec: Spec = model.spec  # pyright: ignore[reportAttributeAccessIssue]
    shapes = variable_shapes(spec)
    return traverse_util.unflatten_dict({path: _draw(path, shape, spec, seed) for path, shape in shapes.items()})
