"""The teacher's part in a training step: soft targets that another network gives for the same images.

Hinton et al. 2015 (1503.02531) train a network on the softmax of another one at a temperature. Beyer et al. 2022
(2106.05237, "function matching") give both networks the same crop, mix the images inside the step, and leave out the
labels (`weight` 1).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.training.losses import distillation_loss

# How the images are prepared for the teacher: as its card says, or as for the student.
PREPARATIONS = ("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher's network, how images are prepared for it, and how its answers enter the loss."""

    network: MobileNet
    scale: tuple[float, ...]  # with `shift`, per channel: the teacher sees scale * x + shift, for the student's x
    shift: tuple[float, ...]
    image_size: int  # pixels of the teacher's images; other sizes are resized
    interpolation: str  # nearest | bilinear | bicubic, of resizing
    divergence: str  # a key of losses.DIVERGENCES
    temperature: float
    weight: float  # of the teacher's term in the loss, above 0; the labels have 1 - weight


def ask_teacher(distillation: Distillation, variables: Any, images: jax.Array) -> jax.Array:
    """Return the teacher's logits [B, K] of images [B, H, W, C] that are normalised for the student, and mixed.

    The teacher is in its evaluation form: with running statistics, which `lowering="auto"` folds into the kernels, and
    with nothing dropped. No gradient passes through the answer.
    """
    scale, shift = (
        jnp.asarray(values, jnp.float32)[None, None, None, :] for values in (distillation.scale, distillation.shift)
    )
    images, size = images * scale + shift, distillation.image_size
    if images.shape[1:3] != (size, size):
        shape = (images.shape[0], size, size, images.shape[3])
        images = jax.image.resize(images, shape, distillation.interpolation)
    logits: Any = distillation.network.apply(variables, images, train=False)
    return lax.stop_gradient(logits)


def learn_from(
    distillation: Distillation, logits: jax.Array, answers: jax.Array, *, labels_loss: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the losses [B] with the teacher's term, and metrics [B]: that term alone, and whether both classes agree.

    Args:
      distillation: how the two terms are weighted.
      logits: the student's [B, K].
      answers: the teacher's logits [B, K].
      labels_loss: the losses [B] by the labels.
    """
    term = distillation_loss(logits, answers, divergence=distillation.divergence, temperature=distillation.temperature)
    weight = distillation.weight
    losses = term if weight == 1 else (1 - weight) * labels_loss + weight * term
    agrees = jnp.argmax(logits, axis=-1) == jnp.argmax(answers, axis=-1)
    return losses, {"distill_loss": term, "teacher_agreement": agrees.astype(jnp.float32)}
