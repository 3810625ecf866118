import dataclasses
import functools
import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh
from processes import OVERRIDES, SPEC, finish, make_tiny_spec, start

from configs import v2
from mobilenet_jax.models import zoo
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training import build
from mobilenet_jax.training import run as train
from mobilenet_jax.training.sharding import (
    AXIS,
    describe_devices,
    make_key,
    make_mesh,
    put_batch,
    replicate,
    shard_train_step,
)
from mobilenet_jax.training.steps import StepOptions, TrainState, create_state, train_step
from mobilenet_jax.workdir.metrics import read_metrics

CLASSES, SIZE, BATCH_SIZE, DECAY = 5, 16, 48, 0.8
MEAN, STD = (120.0, 130.0, 140.0), (60.0, 50.0, 40.0)
RNG = np.random.default_rng(0)
# Images grow brighter along the batch, so that the devices' shares differ.
IMAGES = (RNG.integers(0, 128, (BATCH_SIZE, SIZE, SIZE, 3)) + np.arange(BATCH_SIZE)[:, None, None, None] * 2.5).astype(
    np.uint8
)
BATCH = {"images": IMAGES, "labels": RNG.integers(0, CLASSES, BATCH_SIZE, np.int32)}


@functools.cache
def make_variables() -> dict:
    return init_variables(MobileNet(SPEC), seed=0)


def mesh_of(devices: int) -> Mesh:
    return make_mesh(jax.devices()[:devices])


def test_devices_are_named_and_a_missing_platform_stops():
    assert describe_devices() == describe_devices("cpu") == "8 cpu, processes: 1"
    with pytest.raises(RuntimeError, match=r"^tpu was asked for and JAX .* found 8 cpu, processes: 1; choose"):
        describe_devices("tpu")


def prepare_step(
    parallel: str,
    devices: int,
    *,
    spec: Spec = SPEC,
    freeze_stats: bool = False,
    batch: dict[str, np.ndarray] = BATCH,
    **options: Any,
) -> tuple[Any, tuple]:
    """Return a step of SGD with learning rate 1, and its arguments."""
    optimizer, mesh = optax.sgd(1.0), mesh_of(devices)
    axis = AXIS if parallel == "pmap" else None
    step_options = StepOptions(**{"mean": MEAN, "std": STD, "ema_decay": 0.9, **options}, axis=axis)
    model = MobileNet(spec, freeze_stats=freeze_stats)
    step = functools.partial(train_step, model=model, optimizer=optimizer, options=step_options)
    state = replicate(create_state(make_variables(), optimizer, ema=True), mesh)
    key = make_key(0, mesh)
    return shard_train_step(step, mesh, parallel), (state, put_batch(batch, mesh), key)


def step_once(parallel: str, devices: int, **options: Any) -> tuple[TrainState, dict[str, tuple[float, float]]]:
    """One step on the same batch, as `prepare_step` makes it."""
    step, arguments = prepare_step(parallel, devices, **options)
    return jax.device_get(step(*arguments))


@pytest.mark.parametrize("devices", [2, 4])
def test_no_image_moves_to_another_device(devices):
    """A device has 24 or 12 images, which the sums over pixels split into 8 or 4 parts."""
    step, arguments = prepare_step("jit", devices)
    program = step.lower(*arguments).compile().as_text()
    assert "all-reduce" in program
    assert not [kind for kind in ("collective-permute", "all-gather", "all-to-all") if kind in program]


def assert_same_step(got, want, *, rtol: float = 1e-4) -> None:
    """Sums, and how far parameters, statistics and averages moved: a wrong factor shows at once."""
    for name, (total, count) in want[1].items():
        assert got[1][name] == (pytest.approx(total, rel=rtol), count)
    start = make_variables()["params"]
    for path, moved in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, want[0].params, start)):
        leaf = functools.reduce(lambda tree, key: tree[key.key], path, got[0].params)
        first = functools.reduce(lambda tree, key: tree[key.key], path, start)
        # float32 sums in another order; parameters of about 1 keep 6e-8 of what moved them.
        np.testing.assert_allclose(leaf - first, moved, rtol=rtol, atol=1e-6, err_msg=str(path))
    for tree in ("batch_stats", "ema"):
        same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
        jax.tree.map(same, getattr(got[0], tree), getattr(want[0], tree))


@functools.cache
def frozen_on_one_device():
    return step_once("jit", 1, freeze_stats=True)


@pytest.mark.parametrize(
    ("parallel", "devices", "accumulate"),
    [
        *[("pmap", devices, 1) for devices in (1, 2, 8)],
        *[("jit", devices, 1) for devices in (2, 8)],
        *[("jit", 1, 4), ("jit", 8, 3), ("pmap", 2, 4), ("pmap", 8, 3)],
    ],
)
def test_trap_33_with_frozen_statistics_every_way_takes_the_same_step(parallel, devices, accumulate):
    """SGD, because RMSProp would hide a factor of the gradient."""
    got = step_once(parallel, devices, freeze_stats=True, accumulate=accumulate)
    assert_same_step(got, frozen_on_one_device())


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_frozen_parameters_stay_and_the_others_step_alike_on_several_devices(parallel):
    start = make_variables()["params"]
    frozen = {name: jax.tree.map(lambda _, n=name: n != "classifier", part) for name, part in start.items()}
    state, _ = step_once(parallel, 3, freeze_stats=True, frozen=frozen)
    want, _ = frozen_on_one_device()
    for name in start:
        same = want.params if name == "classifier" else start
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params[name], same[name]
        )


@pytest.mark.parametrize("devices", [3, 8])
def test_frozen_statistics_stay_to_the_last_bit_on_every_number_of_devices(devices):
    stats = jax.tree.map(lambda x: x + np.float32(0.1), make_variables()["batch_stats"])
    variables = {"params": make_variables()["params"], "batch_stats": stats}
    optimizer, mesh = optax.sgd(0.1), mesh_of(devices)
    step = functools.partial(
        train_step,
        model=MobileNet(SPEC, freeze_stats=True),
        optimizer=optimizer,
        options=StepOptions(mean=MEAN, std=STD, axis=AXIS),
    )
    state = replicate(create_state(variables, optimizer, ema=False), mesh)
    step = shard_train_step(step, mesh, "pmap")
    for _ in range(3):
        state, _ = step(state, put_batch(BATCH, mesh), make_key(0, mesh))
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, stats)


def test_jit_takes_the_same_step_with_batch_statistics_and_mixing_on_1_and_8_devices():
    options: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1}
    assert_same_step(step_once("jit", 8, **options), step_once("jit", 1, **options), rtol=1e-3)


def test_running_variance_of_pmap_misses_the_variance_between_devices():
    """The law of total variance: of all images = mean within the devices + variance of the devices' means."""
    first = {parallel: step_once(parallel, 8)[0].batch_stats["stem"]["norm"] for parallel in ("jit", "pmap")}
    kernel = make_variables()["params"]["stem"]["conv"]["kernel"]
    inputs = ((IMAGES - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    dimensions = ("NHWC", "HWIO", "NHWC")
    maps = lax.conv_general_dilated(jnp.asarray(inputs), kernel, (2, 2), "SAME", dimension_numbers=dimensions)
    shares = np.asarray(maps, np.float64).reshape(8, -1, SPEC.stem.filters)
    between = shares.mean(1).var(0)
    assert (between > 0.1 * shares.var((0, 1))).any()  # enough to be seen
    np.testing.assert_allclose(first["pmap"]["mean"], first["jit"]["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["jit"]["mean"], (1 - DECAY) * shares.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first["pmap"]["var"], DECAY + (1 - DECAY) * shares.var(1).mean(0), rtol=1e-5)
    missed = first["jit"]["var"].astype(np.float64) - first["pmap"]["var"]
    np.testing.assert_allclose(missed, (1 - DECAY) * between, rtol=1e-3, atol=1e-6)


def test_devices_of_pmap_draw_their_own_dropout():
    """Two devices with the same images would take the step of one if they dropped the same."""
    spec = dataclasses.replace(SPEC, dropout=0.5)
    half = {name: values[: BATCH_SIZE // 2] for name, values in BATCH.items()}
    twice = {name: np.concatenate([values, values]) for name, values in half.items()}
    one, two = (
        step_once("pmap", devices, spec=spec, freeze_stats=True, batch=batch)[0].params["classifier"]["kernel"]
        for devices, batch in ((1, half), (2, twice))
    )
    moved = np.abs(one - make_variables()["params"]["classifier"]["kernel"]).max()
    assert np.abs(two - one).max() > 0.05 * moved


def test_a_value_of_one_device_cannot_pass_for_everyones():
    """What `check_vma` is for: a step that forgets its mean over the devices does not trace."""
    mesh = mesh_of(2)
    step = shard_train_step(lambda state, batch, key: (state, jnp.sum(batch["labels"])), mesh, "pmap")
    with pytest.raises(ValueError, match="out_specs"):
        step(jnp.zeros(()), put_batch(BATCH, mesh), jax.random.key(0))


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_the_state_is_donated_and_the_variables_it_came_from_are_not(parallel):
    variables = jax.tree.map(jnp.asarray, make_variables())
    optimizer, mesh = optax.sgd(0.1), mesh_of(2)
    options = StepOptions(mean=MEAN, std=STD, ema_decay=0.9, axis=AXIS if parallel == "pmap" else None)
    step = functools.partial(train_step, model=MobileNet(SPEC), optimizer=optimizer, options=options)
    state = replicate(create_state(variables, optimizer, ema=True), mesh)
    new, _ = shard_train_step(step, mesh, parallel)(state, put_batch(BATCH, mesh), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, variables)))


def test_batch_is_split_in_order_and_state_is_everywhere():
    mesh = mesh_of(8)
    labels = put_batch(BATCH, mesh)["labels"]
    for i, shard in enumerate(sorted(labels.addressable_shards, key=lambda shard: shard.device.id)):
        np.testing.assert_array_equal(shard.data, BATCH["labels"][6 * i : 6 * i + 6])
    copies = replicate({"x": np.arange(3)}, mesh)["x"].addressable_shards
    assert len(copies) == 8
    for shard in copies:
        np.testing.assert_array_equal(shard.data, np.arange(3))


# Whole runs: the tiny network under a name of its own, trained on digits by the command line.


def without_times(workdir: Path) -> list[dict]:
    lines = read_metrics(workdir)
    return [{name: line[name] for name in line if not name.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    """A run on 2 processes x 2 devices, stopped by a signal to one and continued; and a run in one go."""
    root = tmp_path_factory.mktemp("runs")
    stopped, whole = root / "stopped", root / "whole"
    running = start(stopped, steps=1_000_000, processes=2)
    try:
        metrics = stopped / "metrics.jsonl"
        while not (metrics.exists() and len(read_metrics(stopped)) >= 6):
            assert all(process.poll() is None for process in running), finish(running)
            time.sleep(0.02)
        running[1].send_signal(signal.SIGTERM)
    finally:
        said = finish(running)
    steps = read_metrics(stopped)[-1]["step"]
    finish(start(stopped, steps=steps + 3, processes=2))
    finish(start(whole, steps=steps + 3, processes=2))
    return {"stopped": stopped, "whole": whole, "stopped_at": steps, "said": said}


def train_on(devices: int, parallel: str, workdir: Path, monkeypatch, **values: Any) -> list[float]:
    """The first five losses of the same run on some of this process's devices."""
    monkeypatch.setitem(zoo.MODELS, "tiny", make_tiny_spec)
    monkeypatch.setattr(build, "make_mesh", lambda: mesh_of(devices))
    config = v2.get_config()
    config.update_from_flattened_dict({**OVERRIDES, "train.steps": 5, "parallel": parallel, **values})
    train.train_and_evaluate(config, workdir)
    return [line["train/loss"] for line in read_metrics(workdir)]


@pytest.mark.slow
def test_first_five_losses_are_the_same_on_1_device_8_devices_and_2_processes_of_2(
    two_processes, tmp_path, monkeypatch
):
    """But for sums in another order: each is off by up to 6e-8 of its value, and the steps amplify it."""
    one = train_on(1, "jit", tmp_path / "1", monkeypatch)
    eight = train_on(8, "jit", tmp_path / "8", monkeypatch)
    processes = [line["train/loss"] for line in read_metrics(two_processes["whole"])[:5]]
    assert len(one) == 5
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    np.testing.assert_allclose(processes, one, rtol=1e-5)
    # Per-device statistics are another training, which the tolerance must tell from this.
    per_device = train_on(8, "pmap", tmp_path / "pmap", monkeypatch)
    assert np.abs(np.divide(per_device, one) - 1).max() > 1e-4


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(two_processes):
    step = f"saved at step {two_processes['stopped_at']:,}; the same command continues"
    assert f"a signal to another process: {step}" in two_processes["said"][0]
    assert f"SIGTERM: {step}" in two_processes["said"][1]


def test_two_processes_resume_to_the_bit(two_processes):
    whole = without_times(two_processes["whole"])
    assert [line["step"] for line in whole] == list(range(1, two_processes["stopped_at"] + 4))
    assert whole[-1]["eval/count"] == whole[-1]["eval_ema/count"] == 360
    assert without_times(two_processes["stopped"]) == whole
    results = [json.loads((two_processes[run] / "result.json").read_text()) for run in ("stopped", "whole")]
    assert results[0] == results[1]


def test_only_the_first_process_writes(two_processes):
    assert len(list(two_processes["whole"].glob("events.out.*"))) == 1
    assert "loss" in two_processes["said"][0]
    assert "loss" not in two_processes["said"][1]


def test_another_number_of_processes_is_refused(two_processes):
    workdir, steps = two_processes["whole"], two_processes["stopped_at"] + 3
    (said,) = finish(start(workdir, steps=steps, processes=1), code=2)
    assert "processes was 2 and is 1" in said
    assert "Traceback" not in said


def test_a_run_of_two_processes_can_be_fine_tuned_on_one(two_processes, tmp_path, monkeypatch):
    losses = train_on(1, "jit", tmp_path / "tuned", monkeypatch, init=str(two_processes["whole"]))
    assert len(losses) == 5
    # It starts from the trained weights, and not afresh.
    assert abs(losses[0] - read_metrics(two_processes["whole"])[0]["train/loss"]) > 1e-4


def test_a_run_of_two_processes_is_evaluated_on_one(two_processes):
    last = without_times(two_processes["whole"])[-1]
    (running,) = start(two_processes["whole"], steps=last["step"], processes=1, mode="eval")
    found, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    evaluation = json.loads(found)
    assert evaluation.keys() == {"step"} | {name for name in last if name.startswith(("eval/", "eval_ema/"))}
    for name, value in evaluation.items():
        # Losses are sums in another order on two devices than on four.
        assert value == (pytest.approx(last[name], rel=1e-6) if name.endswith(("loss", "ece")) else last[name]), name
