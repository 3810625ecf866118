"""Initial values: one rule for the scale of every kernel, drawn by linen initialisers or, faster, by NumPy."""

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

    `he` is normal with variance 2 / (k*k*C_out/groups): k*k alone for a depthwise kernel [k, k, 1, C], where a fan-out
    of k*k*C would be sqrt(C) too small; the classifier has .01 (torchvision/models/mobilenetv2.py; timm
    `_efficientnet_builder.py`). `slim` is .09, V3 .008 (tensorflow/models slim `mobilenet_v1.py`, README of V3).
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


def init_variables(model: nn.Module, *, seed: int, image_size: int) -> dict:
    """Variables of `model` with the distributions of `model.init`, as NumPy arrays in float32.

    `jax.jit(model.init)` spends 10 to 20 s compiling a generator for each kernel; here shapes come from
    `jax.eval_shape` and values from NumPy. The values depend on the seed and the paths alone.
    """
    spec: Spec = model.spec  # pyright: ignore[reportAttributeAccessIssue]
    images = jax.ShapeDtypeStruct((1, image_size, image_size, spec.in_channels), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    flat = {
        path: _draw(path, leaf.shape, spec, seed) for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return traverse_util.unflatten_dict(flat)
