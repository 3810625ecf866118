"""The training loop."""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from absl import logging

from mobilenet_jax.training.build import Setup
from mobilenet_jax.training.dead_filters import count_dead_filters
from mobilenet_jax.training.evaluate import StateEvaluation, make_evaluator
from mobilenet_jax.training.log import Log
from mobilenet_jax.training.memory import return_free_memory, wait_for_buffers
from mobilenet_jax.training.profile import Profiler
from mobilenet_jax.training.quantized import QuantizedNetwork
from mobilenet_jax.training.sharding import AXIS, make_key, put_batch, replicate, shard_train_step, sum_rows
from mobilenet_jax.training.signals import StopSignals
from mobilenet_jax.training.start import Start
from mobilenet_jax.training.steps import StepOptions, Sums, TrainState, train_step
from mobilenet_jax.training.task import Task, recompute_stats
from mobilenet_jax.workdir.checkpoint import Checkpoints
from mobilenet_jax.workdir.files import write_json_atomic


@dataclass(frozen=True)
class End:
    """The state, the last evaluation and the reason at the end of a loop."""

    state: TrainState
    evaluation: StateEvaluation | None  # the last evaluation, if there was one
    stopped: bool  # by a signal, with a checkpoint saved


def train(
    setup: Setup,
    task: Task,
    start: Start,
    *,
    log: Log,
    checkpoints: Checkpoints,
    profiler: Profiler,
    signals: StopSignals,
    seconds: dict[str, float],
) -> End:
    """Train to the last step of the plan, or to a signal.

    The order within a step: next batch, end of the step before (on a CPU), step, log of the step before, evaluation,
    save. Evaluations and saves wait for their own step, because a step that is not finite is never saved. `seconds` are
    the parts of the start so far.
    """
    plan, state, step_fn, evaluation, stops = setup.plan, start.state, None, None, False
    key, evaluate = make_key(setup.config.seed, setup.mesh), make_evaluator(task, setup.mesh)
    log.restart_line()
    for step in range(start.step + 1, plan.total_steps + 1):
        batch, skipped = next_batch(setup, task, log)
        if step_fn is None or plan.begins_phase(step):
            with log.paused():
                step_fn, parts = compile_step(setup, task, state, batch, key, step=step)
            report_start(setup, step, seconds, log.restart_line(), parts)
            seconds = {}
        wait_for_buffers(state.step, setup.mesh)
        with profiler.step(step, state):
            state, sums = step_fn(state, batch, key)
        log.add(step, {**sums, **diagnose(setup, step, state)}, skipped)
        stops = signals.should_stop()
        evaluates, saves = plan.is_due(step, plan.eval_every), plan.is_due(step, plan.save_every) or stops
        if evaluates or saves:
            log.read()
            with log.paused():
                if step == plan.total_steps and plan.stats_batches:
                    state = recompute_stats(setup, task, state)
                evaluation = evaluate(state) if evaluates else evaluation
                if evaluates or plan.is_due(step, plan.log_every):
                    log.write(step, evaluation.metrics if evaluates and evaluation else {})
                if saves:
                    checkpoints.save(step, state, task.iterator, {**describe_run(setup), **log.seal(step, state)})
        if stops:
            break
    checkpoints.wait()
    return End(state, evaluation, stops)


def next_batch(setup: Setup, task: Task, log: Log) -> tuple[dict[str, jax.Array], int | jax.Array]:
    """Return the next batch on the devices, and the number of images that all processes skipped for it."""
    with log.waiting():
        batch = next(task.iterator)
    skipped = sum_rows(batch.pop("skipped"), setup.mesh)
    return put_batch(batch, setup.mesh), skipped


def compile_step(
    setup: Setup, task: Task, state: TrainState, batch: dict[str, jax.Array], key: jax.Array, *, step: int
) -> tuple[Callable, dict[str, float]]:
    """Return the compiled training step of a task from `step` on, and the seconds of tracing and compiling.

    The result is a function (state, batch, key) -> (state, sums); the variables of a teacher are bound to it.
    """
    start, network = time.perf_counter(), task.network
    if isinstance(network, QuantizedNetwork):
        network = network.clone(freeze_ranges=step > setup.plan.range_steps)
    teacher = () if setup.teacher is None else (replicate(setup.teacher.variables, setup.mesh),)
    jitted = make_train_step(setup, network, mean=task.mean, std=task.std, frozen=step <= setup.plan.freeze_steps)
    with _without_collector():
        lowered = jitted.lower(state, batch, key, *teacher)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return_free_memory()
    seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}
    return lambda state, batch, key: compiled(state, batch, key, *teacher), seconds


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Stop Python's garbage collector in this context. It takes a fifth of the time of tracing and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_train_step(
    setup: Setup, network: Any, *, mean: tuple[float, ...], std: tuple[float, ...], frozen: bool = False
) -> Any:
    """Return the jitted training step of `network` over the setup's mesh; `mean` and `std` normalise its inputs.

    `frozen`: the step of the phase in which the parameters of optim.freeze are not trained. The step of a setup with a
    teacher takes the teacher's variables as its fourth argument.
    """
    config = setup.config
    if frozen and config.optim.freeze_epochs is not None:
        network = network.clone(freeze_stats=True)
    options = StepOptions(
        mean=mean,
        std=std,
        frozen=setup.frozen if frozen else None,
        label_smoothing=config.train.label_smoothing,
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        mix_probability=config.data.mix_probability,
        accumulate=config.train.accumulate,
        ema_decay=config.ema.decay,
        axis=AXIS if config.parallel == "pmap" else None,
        distill=setup.teacher and setup.teacher.distillation,
    )
    step = functools.partial(train_step, model=network, optimizer=setup.optimizer, options=options)
    return shard_train_step(step, setup.mesh, config.parallel, taught=setup.teacher is not None)


def report_start(setup: Setup, step: int, before: dict[str, float], waited: float, parts: dict[str, float]) -> None:
    """Log the seconds that passed before the first step of a phase; write those of the process to startup.json.

    `before` are the parts until the loop, `waited` the wait for the first batch, `parts` tracing and compiling.
    """
    seconds = {**before, "data": before.get("data", 0.0) + waited, **parts}
    which = "first step of all layers" if step > setup.plan.freeze_steps else "first step"
    listed = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    logging.info("%s after %.1f s: %s", which, sum(seconds.values()), listed)
    if before and jax.process_index() == 0:
        write_json_atomic(setup.workdir / "startup.json", seconds)


def diagnose(setup: Setup, step: int, state: TrainState) -> Sums:
    """Return the counts of dead filters where `train.diagnose_every_steps` wants them, otherwise nothing."""
    every = setup.config.train.diagnose_every_steps
    if not every or not setup.plan.is_due(step, every):
        return {}
    return count_dead_filters(setup.model.spec, state.params, state.batch_stats)


def describe_run(setup: Setup) -> dict[str, Any]:
    """Return what a checkpoint says of the run it belongs to."""
    return {"config": setup.flat_config, "class_names": list(setup.info.class_names)}
