"""Keras' MobileNets on its JAX backend: `fit` and `predict_on_batch`, both compiled by Keras."""

import functools
import time
from collections.abc import Callable

from protocol import Run, UnsupportedError, serve


def list_models(applications) -> dict[str, Callable]:
    """Return the functions of `keras.applications` by our names; V3 without Keras' rescaling layer."""
    large = functools.partial(applications.MobileNetV3Large, include_preprocessing=False)
    small = functools.partial(applications.MobileNetV3Small, include_preprocessing=False)
    return {
        "mobilenet_v1": applications.MobileNet,
        "mobilenet_v2": applications.MobileNetV2,
        "mobilenet_v3_large": large,
        "mobilenet_v3_small": small,
        "mobilenet_v3_large_minimalistic": functools.partial(large, minimalistic=True),
        "mobilenet_v3_small_minimalistic": functools.partial(small, minimalistic=True),
    }


def load(case: dict) -> tuple[Run, dict]:
    """Load a compiled model and one batch of float32 images, which every step uses."""
    import keras  # pyright: ignore[reportMissingImports]
    import numpy as np

    if case["devices"] > 1:
        raise UnsupportedError("runs on one device here")
    size, count = case["resolution"], case["batch_size"]
    make = list_models(keras.applications)[case["name"]]
    model = make(input_shape=(size, size, 3), alpha=case["width"], weights=None, classifier_activation=None)
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images = np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)
    labels = np.arange(count) % 1000

    class Repeated(keras.utils.PyDataset):
        """The batch, `steps` times: `fit` keeps the state on the device, and `train_on_batch` does not."""

        def __init__(self, steps: int):
            super().__init__()
            self.steps = steps

        def __len__(self) -> int:
            return self.steps

        def __getitem__(self, index: int):
            return images, labels

    def train(steps: int) -> float:
        start = time.perf_counter()
        model.fit(Repeated(steps), epochs=1, shuffle=False, verbose=0)
        return time.perf_counter() - start

    def infer(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model.predict_on_batch(images)
        return time.perf_counter() - start

    about = {"versions": {"keras": keras.__version__, "backend": keras.backend.backend()}}
    return (infer if case["what"] == "infer" else train), about


if __name__ == "__main__":
    serve(load)
