from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from mobilenet_jax.data.loader import make_eval_batches, make_train_iterator
from mobilenet_jax.data.sources import open_source
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training.linear_probe import Features, LinearProbe, compute_features, make_feature_step
from mobilenet_jax.training.sharding import make_mesh

MEAN, STD = (120.0, 130.0, 140.0), (60.0, 50.0, 40.0)
MODEL = create_model("mobilenet_v3_small_minimalistic", width=0.25, num_classes=10, stride_one=(0,), dropout=0.5)


def make_config() -> Any:
    config: Any = base.get_config()
    config.data.update({"image_size": 16, "batch_size": 16, "eval_batch_size": 112})  # 360 test images: 24 in the last
    return config


def compute(split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    variables = init_variables(MODEL, seed=0)
    mesh = make_mesh()
    batches, _ = make_eval_batches(make_config().data, process_index=0, process_count=1, split=split)
    step = make_feature_step(MODEL, mesh, mean=MEAN, std=STD)
    return *compute_features(step, variables, batches, mesh=mesh), variables


def test_features_are_what_the_classifier_sees_of_each_image_once_and_in_order():
    vectors, labels, variables = compute("test")
    source = open_source(make_config().data, "test")
    np.testing.assert_array_equal(labels, [source[i].label for i in range(360)])
    batches, _ = make_eval_batches(make_config().data, process_index=0, process_count=1)
    images = np.concatenate([batch["images"][batch["mask"]] for batch in batches])
    inputs = normalise_images(jnp.asarray(images), MEAN, STD)
    logits = jax.jit(MODEL.apply)(variables, inputs)
    got: Any = LinearProbe(MODEL.spec).apply(variables, vectors[:, None, None, :])
    # The whole network's logits from the vectors and the classifier alone, by the same parameter paths.
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)


def test_the_probe_drops_its_input_in_training_alone():
    variables = init_variables(MODEL, seed=0)
    probe = LinearProbe(MODEL.spec)
    vectors = np.ones((4, 1, 1, 1024), np.float32)
    kernel, bias = variables["params"]["classifier"].values()
    logits: Any = probe.apply(variables, vectors)
    np.testing.assert_allclose(logits, vectors[:, 0, 0] @ kernel + bias, rtol=1e-4, atol=1e-5)
    drawn: list[Any] = [
        probe.apply(variables, vectors, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1, 0)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(np.subtract(drawn[0], drawn[1])).min() > 0


def test_features_take_the_place_of_images_in_both_loaders_batch_by_batch():
    """The order of training is that of the images they came from, so that a state fits either."""
    config = make_config()
    count = len(open_source(config.data, "train"))
    labels = np.array([open_source(config.data, "train")[i].label for i in range(count)], np.int32)
    vectors = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    features = Features(vectors, labels, name="train", class_names=tuple("0123456789"))
    arguments: dict[str, Any] = {"process_index": 0, "process_count": 1}
    images = make_train_iterator(config.data, seed=3, **arguments)
    iterator = make_train_iterator(config.data, seed=3, **arguments, features=features)
    iterator.set_state(images.get_state())
    for _ in range(3):
        batch = next(iterator)
        np.testing.assert_array_equal(batch["labels"], next(images)["labels"])
        assert (batch["images"].shape, batch["images"].dtype) == ((16, 1, 1, 3), np.float32)
        np.testing.assert_array_equal(labels[(batch["images"][:, 0, 0, 0] / 3).astype(int)], batch["labels"])
    for stream in (images, iterator):
        stream.close()
    batches, seen = make_eval_batches(config.data, **arguments, features=features)
    got = [batch["images"][batch["mask"]] for batch in batches]
    assert seen == count
    np.testing.assert_array_equal(np.concatenate(got)[:, 0, 0], vectors)
