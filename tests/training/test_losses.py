import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.training.losses import mix_batch, softmax_cross_entropy

LOGITS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * 3
CLASSES = np.array([0, 1, 2, 3, 4, 0], np.int32)


def _reference(logits, targets, smoothing):
    """Cross-entropy in double precision, written as a sum over classes."""
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = (1 - smoothing) * targets + smoothing / logits.shape[-1]
    return -(smooth * log_probabilities).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trap_12_smoothing_reaches_integer_and_mixed_labels(smoothing):
    onehot = np.eye(5)[CLASSES]
    mixed = 0.3 * onehot + 0.7 * onehot[::-1]
    for targets, soft in ((CLASSES, onehot), (onehot, onehot), (mixed, mixed)):
        got = softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(targets), label_smoothing=smoothing)
        np.testing.assert_allclose(got, _reference(LOGITS, soft, smoothing), rtol=1e-5)


def test_smoothed_loss_of_uniform_logits_is_the_logarithm_of_the_classes():
    loss = softmax_cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 9]), label_smoothing=0.1)
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)


def test_loss_is_float32_for_bfloat16_logits():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = softmax_cross_entropy(logits, jnp.asarray(CLASSES), label_smoothing=0.0)
    want = _reference(np.asarray(logits, np.float32), np.eye(5)[CLASSES], 0.0)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize(
    "targets", [np.zeros(5, np.int32), np.zeros(6, np.float32), np.zeros((6, 4)), np.zeros((6, 5), np.int32)]
)
def test_targets_that_do_not_fit_are_refused(targets):
    with pytest.raises(ValueError, match="do not fit"):
        softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(targets), label_smoothing=0.0)


BATCH, HEIGHT, WIDTH = 4, 12, 8
# Each image is constant and equals its number, so that a mixed pixel tells its share.
IMAGES = jnp.broadcast_to(jnp.arange(BATCH, dtype=jnp.float32)[:, None, None, None], (BATCH, HEIGHT, WIDTH, 3))
LABELS = jnp.eye(BATCH)


def _mix(draws, **config):
    """Images and labels of many draws: [draws, B, H, W, C], [draws, B, K]."""
    config = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, **config}
    keys = jax.random.split(jax.random.key(0), draws)
    images, labels = jax.jit(jax.vmap(lambda key: mix_batch(key, IMAGES, LABELS, **config)))(keys)
    return np.asarray(images), np.asarray(labels)


def test_mixup_is_the_formula_with_one_lambda_from_beta():
    alpha, draws = 0.4, 4000
    images, labels = _mix(draws, mixup=alpha)
    share = labels[:, 0, 0]
    want = share[:, None] * np.arange(BATCH) + (1 - share[:, None]) * np.arange(BATCH)[::-1]
    np.testing.assert_allclose(images, np.broadcast_to(want[..., None, None, None], images.shape), atol=1e-5)
    for i in range(BATCH):
        np.testing.assert_allclose(labels[:, i, i], share, atol=1e-6)
        np.testing.assert_allclose(labels[:, i, BATCH - 1 - i], 1 - share, atol=1e-6)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); five standard errors of 4,000 draws.
    assert share.mean() == pytest.approx(0.5, abs=5 * np.sqrt(0.139 / draws))
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_cutmix_pastes_one_box_and_labels_follow_its_clipped_area():
    images, labels = _mix(2000, cutmix=1.0)
    pasted = images[:, 0, :, :, 0] == BATCH - 1  # of image 0, whose own pixels are 0
    assert set(np.unique(images[:, 0])) == {0.0, BATCH - 1.0}
    area = pasted.mean((1, 2))
    np.testing.assert_allclose(labels[:, 0, 0], 1 - area, atol=1e-6)
    np.testing.assert_allclose(labels[:, 0, BATCH - 1], area, atol=1e-6)
    # A box: as many pixels as the rows it touches times the columns, for each draw.
    assert (pasted.sum((1, 2)) == pasted.any(2).sum(1) * pasted.any(1).sum(1)).all()
    # The same box everywhere in the batch.
    assert ((images[:, 1, :, :, 0] == BATCH - 2) == pasted).all()
    for axis in (1, 2):  # rows, columns: all get a box in turn, those in the middle more often
        covered = pasted.any(3 - axis).mean(0)
        assert 0 < covered[0] < covered[len(covered) // 2]


def test_cutmix_box_has_the_sides_that_lambda_gives_unless_it_is_clipped():
    """Against timm's `rand_bbox` in integers, for the same lambda and centre."""
    for seed in range(20):
        key = jax.random.key(seed)
        _, labels = mix_batch(key, IMAGES, LABELS, mixup=0.0, cutmix=1.0, probability=1.0)
        lambda_key, y_key, x_key = jax.random.split(jax.random.split(key, 4)[3], 3)
        ratio = np.sqrt(1 - float(jax.random.beta(lambda_key, 1.0, 1.0)))
        area = 1
        for side_key, size in ((y_key, HEIGHT), (x_key, WIDTH)):
            cut, centre = int(size * ratio), int(jax.random.randint(side_key, (), 0, size))
            area *= np.clip(centre + cut // 2, 0, size) - np.clip(centre - cut // 2, 0, size)
        np.testing.assert_allclose(labels[0, 0], 1 - area / (HEIGHT * WIDTH), atol=1e-6)


def test_one_of_the_two_is_drawn_and_a_share_of_the_steps_does_not_mix():
    draws = 4000
    images, _ = _mix(draws, mixup=1.0, cutmix=1.0, probability=0.6)
    first = images[:, 0, :, :, 0].reshape(draws, -1)
    untouched = (first == 0).all(1)
    blended = ((first > 0) & (first < BATCH - 1)).all(1)
    boxed = ~untouched & ~blended
    error = 5 * np.sqrt(0.25 / draws)
    assert blended.mean() == pytest.approx(0.3, abs=error)
    # A cutmix box of fewer than 2 pixels a side is empty and counts as untouched here.
    assert boxed.mean() == pytest.approx(0.3, abs=0.05)
    assert untouched.mean() >= 0.4 - error


def test_without_mixing_nothing_is_traced():
    images, labels = mix_batch(jax.random.key(0), IMAGES, LABELS, mixup=0.0, cutmix=0.0, probability=1.0)
    assert images is IMAGES
    assert labels is LABELS
