"""Cross-entropy with label smoothing, divergences from a teacher, and the mixing of images inside the jitted step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array, *, label_smoothing: float) -> jax.Array:
    """Return the cross-entropy of each example, in float32 for logits of any dtype.

    Args:
      logits: [B, K].
      targets: classes [B] of an integer dtype, or probabilities [B, K], as `mix_batch` makes them.
      label_smoothing: e in (1 - e) * target + e / K, for both kinds of targets; in [0, 1).
        Szegedy et al. 2016 (1512.00567), section 7.

    Returns:
      [B], float32. The caller takes the mean, over all examples or over those that a mask selects.

    Raises:
      ValueError: the targets are neither of the two kinds.
    """
    if targets.shape == logits.shape[:1] and jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, logits.shape[-1])
    elif targets.shape != logits.shape or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"targets of shape {targets.shape} and type {targets.dtype} do not fit logits of shape "
            f"{logits.shape}; valid are integer classes [B] or probabilities [B, K]"
        )
    smooth = optax.smooth_labels(targets.astype(jnp.float32), label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), smooth)


def _kullback_leibler(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def _jensen_shannon(student: jax.Array, teacher: jax.Array) -> jax.Array:
    middle = jnp.logaddexp(student, teacher) - jnp.log(2.0)
    return (_kullback_leibler(middle, teacher) + _kullback_leibler(middle, student)) / 2


# Functions of log-probabilities [B, K] of the student and of the teacher.
DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "kl": _kullback_leibler,
    "js": _jensen_shannon,
}


def distillation_loss(student: jax.Array, teacher: jax.Array, *, divergence: str, temperature: float) -> jax.Array:
    """Return T^2 times the divergence of the two softmaxes at temperature T, for each example, in float32.

    Hinton et al. 2015 (1503.02531), section 2: the softmax is that of logits / T, and T^2 keeps the size of the
    gradients about the same at every T.

    Args:
      student: logits [B, K].
      teacher: logits [B, K].
      divergence: kl: KL(teacher || student) | js: the mean of KL(teacher || m) and KL(student || m), where m is the
        mean of the two distributions (Lin 1991). Near equality, js is a quarter of kl.
      temperature: T, above 0.

    Returns:
      [B], float32.
    """
    logs = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student, teacher))
    return temperature**2 * DIVERGENCES[divergence](*logs)


def mix_batch(
    key: jax.Array,
    images: jax.Array,
    labels_onehot: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
) -> tuple[jax.Array, jax.Array]:
    """Mix every image with its partner in the reversed batch, by mixup or by cutmix.

    One draw serves the whole batch, as in timm's `Mixup(mode="batch")`. If both alphas are set, each of the two is
    drawn half of the time. Mixup (1710.09412) keeps a share lambda ~ Beta(alpha, alpha) of each image. Cutmix
    (1905.04899) pastes a box of the partner into the image. The sides of the box are sqrt(1 - lambda) of the sides of
    the image; its centre is uniform, and it is clipped at the border. The labels get the share of the pixels that
    really stayed.

    Args:
      key: the random key of this step.
      images: [B, H, W, C], float.
      labels_onehot: [B, K], float.
      mixup: alpha of Beta(alpha, alpha); 0: off. A Python number, like the next two, because it decides what is traced.
      cutmix: alpha of Beta(alpha, alpha); 0: off.
      probability: the share of the steps that mix at all.

    Returns:
      The mixed images and labels, in the shapes given.
    """
    if not (mixup or cutmix):
        return images, labels_onehot
    apply_key, kind_key, mixup_key, cutmix_key = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    kept = jnp.ones((height, width))  # the share of the image itself in each pixel; the partner has the rest
    if mixup:
        kept = kept * jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        outside = 1 - _draw_box(cutmix_key, height, width, alpha=cutmix)
        use_cutmix = jax.random.bernoulli(kind_key, 0.5 if mixup else 1.0)
        kept = jnp.where(use_cutmix, outside, kept)
    kept = jnp.where(jax.random.bernoulli(apply_key, probability), kept, 1.0)
    share = kept.mean()  # mixup: lambda itself; cutmix: lambda after the clipping of the box
    kept = kept[None, :, :, None]
    return (
        kept * images + (1 - kept) * images[::-1],
        share * labels_onehot + (1 - share) * labels_onehot[::-1],
    )


def _draw_box(key: jax.Array, height: int, width: int, *, alpha: float) -> jax.Array:
    """Return a mask [H, W] with float32 ones in a random box, by the integer arithmetic of timm's `rand_bbox`."""
    lambda_key, y_key, x_key = jax.random.split(key, 3)
    ratio = jnp.sqrt(1 - jax.random.beta(lambda_key, alpha, alpha))

    def inside(key: jax.Array, size: int) -> jax.Array:
        half = (size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, size)
        position = jnp.arange(size)
        return (position >= centre - half) & (position < centre + half)

    return (inside(y_key, height)[:, None] & inside(x_key, width)[None, :]).astype(jnp.float32)
