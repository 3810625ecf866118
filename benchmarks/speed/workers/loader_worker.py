"""Our input: the training loader on a folder of JPEGs, and the cost of each augmentation."""

import functools
import itertools
import time
from typing import Any

import numpy as np
from protocol import Run, UnsupportedError, serve

from configs import base
from mobilenet_jax.cli.allocator import describe_allocator
from mobilenet_jax.data.transforms import make_train_transform

MIXES = ("mixup", "cutmix")
# The keys of config.data in which the sides of `input` differ.
KEYS = {"ours": {}, "ours_fast": {"decode": "fast"}, "ours_resized": {"cache": "resized"}}


def load(case: dict) -> tuple[Run, dict]:
    """Load the loader for `input`; for `augment`, load the transform or the mixing that `name` names."""
    config: Any = base.get_config()
    data = config.data
    data.update({"image_size": case["resolution"], "batch_size": case["batch_size"], "flip": True, "crop": "inception"})
    if case["what"] == "input":
        data.update({"source": "folder", "path": case["images"], "workers": case["workers"], **KEYS[case["side"]]})
        return (load_kept if data.cache else load_input)(data), {"malloc": describe_allocator()}
    key, value = case["name"].split("=")
    if key in MIXES:
        return load_mix(case, {key: float(value)}), {}
    data.update({"crop": "resize", "flip": False, key: type(data[key])(float(value))})
    return load_augment(data), {}


def load_input(data) -> Run:
    """Load the training loader. Prefetched batches are dropped at the end of a turn, so that all turns start equal."""
    from mobilenet_jax.data import loader

    loader.MEMORY_BYTES = 0  # decodes each photograph each time, as for a data set that does not fit in memory

    def run(batches: int) -> float:
        iterator = loader.make_train_iterator(data, seed=0, process_index=0, process_count=1)
        seconds = time_batches(iterator, batches)
        iterator.close()
        return seconds

    return run


def load_kept(data) -> Run:
    """Load the training loader with data.cache and read an epoch; prefetched batches are dropped as in `load_input`."""
    from mobilenet_jax.data import loader
    from mobilenet_jax.data.sources import open_source

    if data.workers:
        raise UnsupportedError("what workers keep in memory would be lost after each turn; valid: --workers=0")
    # The sizes of the copies are not known in advance. A gigabyte for each 2,000 photographs is more than enough.
    source = open_source(data, "train")
    loader.MEMORY_BYTES = max(loader.MEMORY_BYTES, len(source) * 2**19)
    iterator = loader.make_train_iterator(data, seed=0, process_index=0, process_count=1, source=source)
    for _ in range(-(-len(source) // data.batch_size)):
        next(iterator)

    def run(batches: int) -> float:
        seconds = time_batches(iterator, batches)
        iterator.set_state(iterator.get_state())  # ends the threads
        return seconds

    return run


def time_batches(iterator, count: int) -> float:
    """Return the seconds of `count` batches after the first one, which starts the threads or the workers."""
    next(iterator)
    start = time.perf_counter()
    for _ in range(count):
        next(iterator)
    return time.perf_counter() - start


def load_augment(data) -> Run:
    """Load one transform, which one thread applies to a batch of uint8 images of the network's size."""
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
    """Load the mixing of a float32 batch, compiled alone: XLA cannot fuse it with the rest of the training step."""
    import jax
    import jax.numpy as jnp

    from mobilenet_jax.training.losses import mix_batch

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
