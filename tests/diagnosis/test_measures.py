import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.diagnosis.measures import (
    EXACT,
    Moments,
    compare_logits,
    effective_rank,
    measure_int8,
    norm_shrink,
    participation_ratio,
    quantise,
    sqnr_db,
    summarise_gradient_norms,
)
from mobilenet_jax.training.dead_filters import DEAD, relative_norms


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw_filters(rng, channels: int) -> np.ndarray:
    """A depthwise kernel [3, 3, 1, C] of filters with norm 1."""
    kernel = rng.standard_normal((3, 3, 1, channels)).astype(np.float32)
    return kernel / np.sqrt(np.sum(kernel**2, axis=(0, 1, 2)))


# Norms.


@pytest.mark.parametrize("dead", [0, 1, 20, 39])
def test_trap_32_dead_filters_are_found_however_many_they_are(rng, dead):
    kernel = draw_filters(rng, 40)
    kernel[..., :dead] *= 1e-21  # as small as in an official checkpoint
    relative = relative_norms(kernel, np.ones(40))
    assert np.flatnonzero(relative < DEAD).tolist() == list(range(dead))
    np.testing.assert_allclose(relative[dead:], 1, rtol=1e-5)


def test_a_layer_of_zeros_is_all_dead():
    assert relative_norms(np.zeros((3, 3, 1, 4)), np.ones(4)).tolist() == [0, 0, 0, 0]


def test_a_few_huge_filters_do_not_make_the_others_dead(rng):
    kernel = draw_filters(rng, 40)
    kernel[..., :3] *= 5000
    assert (relative_norms(kernel, np.ones(40)) >= DEAD).all()


def test_the_factor_counts_like_the_weights(rng):
    kernel, factor = draw_filters(rng, 8), np.ones(8)
    factor[2], factor[5] = 0, -1e-5
    kernel[..., 6] *= 1e-4
    factor[6] = 1e4  # batch norm scales it up again
    assert np.flatnonzero(relative_norms(kernel, factor) < DEAD).tolist() == [2, 5]


@pytest.mark.parametrize("dead", [0, 5, 6])
def test_norms_under_jit_are_equal_to_numpy(rng, dead):
    kernel, factor = draw_filters(rng, 9), rng.uniform(0.5, 2, 9).astype(np.float32)
    kernel[..., :dead] = 0
    traced = jax.jit(lambda kernel, factor: relative_norms(kernel, factor, xp=jnp))(kernel, factor)
    np.testing.assert_allclose(traced, relative_norms(kernel, factor), rtol=1e-5)


# int8.


def test_sqnr_of_uniform_weights_agrees_with_the_formula(rng):
    # The power is 1/3 and the error step^2 / 12, with steps of 1/127.
    kernel = rng.uniform(-1, 1, (1, 1, 100, 200)).astype(np.float32)
    assert sqnr_db(kernel, quantise(kernel, per_channel=False)) == pytest.approx(10 * np.log10(4 * 127**2), abs=0.1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_weights_are_at_most_255_steps_half_a_step_away(rng, per_channel):
    kernel = rng.standard_normal((3, 3, 1, 16)).astype(np.float32) * np.logspace(0, -2, 16)
    quantised = quantise(kernel, per_channel=per_channel)
    step = np.abs(kernel).max(axis=(0, 1, 2) if per_channel else None) / 127
    steps = quantised / step
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.abs(steps).max() == pytest.approx(127)
    assert (np.abs(quantised - kernel) <= step * 0.5001).all()


def test_weights_on_the_grid_are_exact():
    kernel = np.arange(-127, 128, dtype=np.float32).reshape(1, 1, 1, 255)
    assert sqnr_db(kernel, quantise(kernel, per_channel=False)) == EXACT
    assert sqnr_db(np.zeros(3), quantise(np.zeros((1, 3)), per_channel=True)) == EXACT


def test_trap_31_a_channel_of_100_times_the_range_costs_the_others_40_db(rng):
    kernel = rng.uniform(-1, 1, (3, 3, 1, 32)).astype(np.float32)
    even = measure_int8(kernel)
    kernel[..., 7] *= 100
    found = measure_int8(kernel)
    assert found["range_ratio"] == pytest.approx(100, rel=0.2)
    assert found["channel_sqnr_db"]["per_channel"] == pytest.approx(even["channel_sqnr_db"]["per_channel"], abs=0.01)
    # 20 log10(100) for 31 of 32 channels; a channel whose error is as large as its weights has 0 dB, the least.
    lost = even["channel_sqnr_db"]["per_tensor"] - found["channel_sqnr_db"]["per_tensor"]
    assert lost == pytest.approx(40 * 31 / 32, abs=3)
    # The SQNR of the whole layer hides the loss, because one channel has nearly all of the power.
    assert found["sqnr_db"]["per_tensor"] > 20
    assert found["lost_channels"] == []
    kernel[..., 7] *= 4
    assert measure_int8(kernel)["lost_channels"] == [i for i in range(32) if i != 7]


def test_dead_filters_do_not_count_as_a_loss_of_int8(rng):
    kernel = rng.uniform(-1, 1, (3, 3, 1, 8)).astype(np.float32)
    kernel[..., 3] = 1e-20
    found = measure_int8(kernel)
    assert found["lost_channels"] == []
    assert found["channel_sqnr_db"]["per_tensor"] > 40


# Ranks.


def test_ranks_count_equal_variances_and_fall_with_unequal_ones():
    for measure in (effective_rank, participation_ratio):
        assert measure(np.array([2.0, 2.0, 0.0, -1e-17])) == pytest.approx(2)
        assert measure(np.array([0.0, 5.0])) == pytest.approx(1)
        assert measure(np.zeros(3)) == 0
    variances = np.array([4.0, 2.0, 1.0, 1.0])
    assert effective_rank(variances) == pytest.approx(2**1.75)  # the entropy of 1/2, 1/4, 1/8, 1/8 in bits
    assert participation_ratio(variances) == pytest.approx(64 / 22)


def test_moments_of_batches_equal_the_moments_of_all_vectors(rng):
    # The vectors are far from 0, where sums of squares would lose the variances in float32.
    vectors = (rng.standard_normal((300, 4)) * [3, 1, 0.1, 0.01] + 1000).astype(np.float32).astype(np.float64)
    moments = Moments()
    for part in (vectors[:7], vectors[7:7], vectors[7:200], vectors[200:]):
        mean = part.mean(axis=0) if len(part) else np.zeros(4)
        moments.add(len(part), mean, (part - mean).T @ (part - mean))
    assert moments.count == 300
    expected = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))
    np.testing.assert_allclose(moments.variances(), expected, rtol=1e-9)


# Answers, norms, runs.


def test_answers_are_compared_by_class_and_divergence():
    p = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]])
    q = np.array([[0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])
    same, divergence = compare_logits(np.log(p) + 5, np.log(q))
    assert same == 1
    assert divergence == pytest.approx(np.sum(p * np.log(p / q)))
    assert compare_logits(np.log(p), np.log(p) - 3) == (2, pytest.approx(0, abs=1e-12))


def test_epsilon_shrinks_a_channel_of_its_own_variance_by_root_two():
    np.testing.assert_allclose(norm_shrink(np.array([1e-3, 0, 1e3]), 1e-3), [0.5**0.5, 0, 1], atol=1e-6)


def test_gradient_norms_of_a_run():
    lines = [{"step": i, "train/grad_norm": norm} for i, norm in ((10, 3.0), (20, 8.0), (30, None), (40, 1.0))]
    found = summarise_gradient_norms([*lines, {"step": 50}])
    assert found == {
        "steps": [10, 20, 40],
        "norms": [3.0, 8.0, 1.0],
        "median": 3.0,
        "largest": 8.0,
        "largest_step": 20,
        "last": 1.0,
    }
    assert summarise_gradient_norms([{"step": 1}]) is None
