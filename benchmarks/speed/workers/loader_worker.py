"""Our input: the training loader on a folder of JPEGs, and what each augmentation costs."""

import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Run, serve

from configs import base
from mobilenet_jax.cli.allocator import describe_allocator
from mobilenet_jax.data import loader
from mobilenet_jax.data.transforms import make_train_transform
from mobilenet_jax.training.losses import mix_batch

MIXES = ("mixup", "cutmix")


def load(case: dict) -> tuple[Run, dict]:
    """The loader for `input`; for `augment` the transform, or the mixing in the step, that `name` says."""
    config: Any = base.get_config()
    data = config.data
    data.update({"image_size": case["resolution"], "batch_size": case["batch_size"], "flip": True, "crop": "inception"})
    if case["what"] == "input":
        data.update({"source": "folder", "path": case["images"], "workers": case["workers"]})
        return load_input(data), {"malloc": describe_allocator()}
    key, value = case["name"].split("=")
    if key in MIXES:
        return load_mix(case, {key: float(value)}), {}
    data.update({"crop": "resize", "flip": False, key: type(data[key])(float(value))})
    return load_augment(data), {}


def load_input(data) -> Run:
    """Batches of the real loader; what runs ahead is thrown away, so that each turn starts alike."""

    loader.MEMORY_BYTES = 0  # each photograph is decoded each time, as in a set that no memory holds

    def run(batches: int) -> float:
        iterator = loader.make_train_iterator(data, seed=0, process_index=0, process_count=1)
        next(iterator)
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds = time.perf_counter() - start
        iterator.close()
        return seconds

    return run


def load_augment(data) -> Run:
    """A batch through one transform in one thread: images of the network's size, uint8 to uint8."""
    transform = make_train_transform(data)
    size = (data.batch_size, data.image_size, data.image_size, 3)
    images = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    rng = np.random.default_rng(1)

    def run(batches: int) -> float:
        start = time.perf_counter()
        for _ in range(batches):
            for image in images:
                transform.augment(image, rng)
        return time.perf_counter() - start

    return run


def load_mix(case: dict, alphas: dict[str, float]) -> Run:
    """The mixing of a float32 batch, compiled alone: not fused with what stands before and behind it in the step."""
    size = case["resolution"]
    batch = jnp.zeros((case["batch_size"], size, size, 3)), jnp.zeros((case["batch_size"], 1000))
    mix = jax.jit(functools.partial(mix_batch, **{"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, **alphas}))
    keys = list(jax.random.split(jax.random.key(0), 64))

    def run(batches: int) -> float:
        start, mixed = time.perf_counter(), None
        for key in itertools.islice(itertools.cycle(keys), batches):
            mixed = mix(key, *batch)
        jax.block_until_ready(mixed)
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    serve(load)
