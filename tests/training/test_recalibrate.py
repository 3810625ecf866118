import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec
from mobilenet_jax.training.recalibrate import make_stats_step, measure_stats
from mobilenet_jax.training.sharding import make_mesh

MEAN, STD = (120.0, 130.0, 140.0), (60.0, 50.0, 40.0)
SPEC = Spec(
    name="tiny",
    stem=Conv(filters=8, stride=2),
    blocks=(InvertedResidual(expanded=16, filters=8),) * 2,
    head=None,
    num_classes=5,
    bn_decay=0.999,
    dropout=0.5,
    drop_path=0.5,
)
# Images grow brighter along the set, so that batches differ.
IMAGES = np.random.default_rng(0).integers(0, 128, (48, 16, 16, 3)) + np.arange(48)[:, None, None, None] * 2.5
IMAGES = IMAGES.astype(np.uint8)


def measure(batch_size: int, *, devices: int = 1, seeds: tuple[int, ...] = (0,), freeze_stats: bool = False) -> list:
    mesh = make_mesh(jax.devices()[:devices])
    step = make_stats_step(MobileNet(SPEC, freeze_stats=freeze_stats), mesh, mean=MEAN, std=STD)
    kinds = [init_variables(MobileNet(SPEC), seed=seed) for seed in seeds]
    batches = ({"images": IMAGES[i : i + batch_size]} for i in range(0, 48, batch_size))
    return jax.device_get(measure_stats(step, kinds, batches, mesh=mesh))


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 1), (48, 1), (16, 2)])
def test_trap_17_the_first_norm_has_the_moments_of_all_images(batch_size, devices):
    """Of what no norm comes before: the variance between batches is in it, and the initial statistics are not."""
    variables = init_variables(MobileNet(SPEC), seed=0)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    inputs = normalise_images(jnp.asarray(IMAGES), MEAN, STD)
    # An even size with stride 2 pads (0, 1), as TensorFlow does.
    maps = jax.lax.conv_general_dilated(
        inputs, kernel, (2, 2), [(0, 1), (0, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    maps = np.asarray(maps, np.float64)
    (stats,) = measure(batch_size, devices=devices)
    norm = stats["stem"]["norm"]
    assert norm["mean"].dtype == norm["var"].dtype == np.float32
    np.testing.assert_allclose(norm["mean"], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm["var"], maps.var((0, 1, 2)), rtol=1e-4)


def test_one_batch_gives_the_statistics_that_training_would_see_and_drops_nothing():
    """Whatever bn_decay, drop path and frozen statistics say."""
    model = MobileNet(Spec(**{**vars(SPEC), "bn_decay": 0.0, "drop_path": 0.0, "num_classes": 0}))
    inputs = normalise_images(jnp.asarray(IMAGES), MEAN, STD)
    _, want = model.apply(init_variables(MobileNet(SPEC), seed=0), inputs, train=True, mutable=["batch_stats"])
    for found in (measure(48), measure(48, freeze_stats=True)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0], want["batch_stats"])


def test_each_set_of_variables_has_its_own():
    both = measure(16, seeds=(0, 1))
    for seed, stats in enumerate(both):
        jax.tree.map(np.testing.assert_array_equal, stats, measure(16, seeds=(seed,))[0])
    assert not np.allclose(both[0]["stem"]["norm"]["mean"], both[1]["stem"]["norm"]["mean"])
