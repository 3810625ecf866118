"""Our networks in our training and evaluation steps: the side `ours`, and with plain layers the side `flax`."""

import functools
import time

import jax
import numpy as np
import optax

from benchmarks.speed.workers.protocol import Run, measure_peak, serve
from mobilenet_jax.cli.allocator import describe_allocator
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.training.memory import return_free_memory, wait_for_buffers
from mobilenet_jax.training.sharding import make_key, make_mesh, put_batch, replicate, shard_train_step
from mobilenet_jax.training.steps import StepOptions, create_state, train_step

# The side `flax` has convolutions with feature_group_count, `nn.BatchNorm` and automatic gradients.
LOWERINGS = {"ours": "auto", "flax": "plain"}
GREY = (127.5, 127.5, 127.5)


def load(case: dict) -> tuple[Run, dict]:
    """Compile the step of a case: the training step for `train` and `memory`, the forward pass for `infer`."""
    jax.config.update("jax_num_cpu_devices", case["devices"])
    options = {**case["options"], "lowering": LOWERINGS[case["side"]]}
    model = create_model(case["name"], width=case["width"], **options)
    size, count = case["resolution"], case["batch_size"]
    images = np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)
    make = load_inference if case["what"] == "infer" else load_training
    run, compiled, about = make(model, images)
    memory = compiled.memory_analysis()
    assert memory is not None
    about |= {
        "versions": {"jax": jax.__version__},
        "malloc": describe_allocator(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "temporary_bytes": memory.temp_size_in_bytes,  # of one device
        "temporary_bytes_per_image": memory.temp_size_in_bytes * jax.device_count() / count,
    }
    return run, {**about, **(measure_peak(run) if case["what"] == "memory" else {})}


def load_training(model: MobileNet, images: np.ndarray):
    """Return (run, compiled training step, times) on uint8 images [B, H, W, 3]: SGD with momentum, a donated state."""
    mesh, optimizer = make_mesh(), optax.sgd(0.01, momentum=0.9)
    state = replicate(create_state(init_variables(model, seed=0), optimizer, ema=False), mesh)
    labels = np.arange(len(images), dtype=np.int32) % model.spec.num_classes
    batch, key = put_batch({"images": images, "labels": labels}, mesh), make_key(0, mesh)
    step = functools.partial(train_step, model=model, optimizer=optimizer, options=StepOptions(mean=GREY, std=GREY))
    compiled, about = _compile(shard_train_step(step, mesh, "jit"), state, batch, key)

    def run(steps: int) -> float:
        nonlocal state
        start, sums = time.perf_counter(), None
        for _ in range(steps):
            wait_for_buffers(state.step, mesh)  # as main does
            state, sums = compiled(state, batch, key)
        jax.block_until_ready((state, sums))
        return time.perf_counter() - start

    return run, compiled, about


def load_inference(model: MobileNet, images: np.ndarray):
    """Return (run, compiled forward pass, times) on images that are normalised beforehand."""
    variables = jax.device_put(init_variables(model, seed=0))
    normalised = jax.device_put((images / 127.5 - 1).astype(np.float32))
    compiled, about = _compile(jax.jit(functools.partial(model.apply, train=False)), variables, normalised)

    def run(steps: int) -> float:
        start, logits = time.perf_counter(), None
        for _ in range(steps):
            logits = compiled(variables, normalised)
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    return run, compiled, about


def _compile(function, *arguments):
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return_free_memory()
    return compiled, {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}


if __name__ == "__main__":
    serve(load)
