"""A linear probe: the features of each image, computed once by a frozen network, and the classifier on top of them."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mobilenet_jax.data.sources import Record
from mobilenet_jax.models.layers import Dense, normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.sharding import put_batch, shard_eval_step


class Features:
    """The feature vectors of a split, in the order of its images, as a data source of "images" float32[1, 1, D]."""

    def __init__(self, vectors: np.ndarray, labels: np.ndarray, *, name: str, class_names: tuple[str, ...]):
        self.name, self.class_names = name, class_names
        self._vectors, self._labels = vectors[:, None, None, :], labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._vectors[index], int(self._labels[index]), f"{self.name} {index}")


class LinearProbe(nn.Module):
    """The classifier of a network as a module of its own, with the parameter paths it has in the network."""

    spec: Spec

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the logits [B, num_classes] of vectors [B, 1, 1, D]; training mode draws from the key "dropout"."""
        x = nn.Dropout(self.spec.dropout, deterministic=not train)(images[:, 0, 0, :])
        op = self.spec.classifier_op()
        assert op is not None
        return Dense(op, self.spec, x.dtype, name=op.name)(x)


def make_feature_step(model: MobileNet, mesh: Mesh, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """Return a jitted function (variables, batch) -> (features [B, D], labels, mask), which are on every device.

    The features are the input of the classifier of `model`.
    """
    headless = model.clone(spec=replace(model.spec, num_classes=0))

    def step(variables: dict, batch: dict[str, jax.Array]):
        images = normalise_images(batch["images"], mean, std)
        return headless.apply(variables, images, train=False), batch["labels"], batch["mask"]

    return shard_eval_step(step, mesh)


def compute_features(
    step: Callable, variables: dict, batches: Iterable[dict[str, np.ndarray]], *, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Return (vectors float32 [N, D], labels int32 [N]) of all images of evaluation batches, in their order.

    `step` is a function from `make_feature_step`. Every process gets all vectors.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    read = functools.partial(jax.tree.map, np.asarray)
    for batch in batches:
        vectors, labels, mask = read(step(variables, put_batch(batch, mesh)))
        found.append((vectors[mask], labels[mask]))
    vectors, labels = zip(*found, strict=True)
    return np.concatenate(vectors), np.concatenate(labels)
