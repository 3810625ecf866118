"""A network as StableHLO: one serialized program for CPU, CUDA and TPU, with the weights inside.

`jax.export.deserialize(data).call(images)` runs it with JAX alone, without this package or Flax. It is what JAX itself
compiles, so it has the fast form of each platform (`models/cpu.py`). Products have the highest precision, as in
`predict`, so the answers are the same everywhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import export

from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(
    model: MobileNet,
    variables: Mapping,
    *,
    image_size: int,
    batch: int | None = None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> bytes:
    """Return the serialized program from images to logits.

    Args:
      model: the network.
      variables: {"params", "batch_stats"}.
      image_size: pixels of a side.
      batch: the number of images at once; None: any.
      normalisation: (mean, std) in grey levels; the program then takes uint8. None: it takes normalised float32.
    """
    exact = model.clone(precision="highest")

    def answer(images: jax.Array) -> jax.Array:
        x = normalise_images(images, *normalisation) if normalisation else images
        return exact.apply(variables, x, train=False)  # pyright: ignore[reportReturnType]

    shape = (batch, image_size, image_size, model.spec.in_channels)
    text = ", ".join("batch" if side is None else str(side) for side in shape)
    dtype = jnp.uint8 if normalisation else jnp.float32
    images = jax.ShapeDtypeStruct(export.symbolic_shape(text), dtype)
    return bytes(export.export(jax.jit(answer), platforms=PLATFORMS)(images).serialize())
