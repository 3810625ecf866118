"""A run: build, start, loop, result."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
from absl import logging

from mobilenet_jax.paths import as_path, is_bucket
from mobilenet_jax.training.agree import check_agreement, describe_facts
from mobilenet_jax.training.build import Setup, build
from mobilenet_jax.training.evaluate import make_evaluator
from mobilenet_jax.training.failures import report_failure
from mobilenet_jax.training.finite import NonFiniteError
from mobilenet_jax.training.log import Log
from mobilenet_jax.training.loop import train
from mobilenet_jax.training.profile import Profiler
from mobilenet_jax.training.progress import Progress
from mobilenet_jax.training.result import read_result, write_result
from mobilenet_jax.training.signals import StopSignals
from mobilenet_jax.training.start import Start, make_start
from mobilenet_jax.training.task import Task, calibrate_ranges, open_features, open_images
from mobilenet_jax.workdir.checkpoint import Checkpoints, read_state
from mobilenet_jax.workdir.environment import environment
from mobilenet_jax.workdir.files import write_atomic, write_json_atomic
from mobilenet_jax.workdir.lock import lock_workdir
from mobilenet_jax.workdir.metrics import MetricsWriter

__all__ = ["NonFiniteError", "RefusedError", "evaluate_run", "prepare", "train_and_evaluate"]


class RefusedError(ValueError):
    """A run that cannot begin: its config, its data, its weights or its checkpoints do not fit."""


class Prepared(NamedTuple):
    """A run before its first step."""

    setup: Setup
    checkpoints: Checkpoints
    images: Task  # the whole network on images
    start: Start


@contextlib.contextmanager
def prepare(config, workdir: str | os.PathLike) -> Iterator[Prepared]:
    """Lock a workdir, and check a config against data, devices and its checkpoints; compile nothing.

    On leaving the context, checkpoints that are being written are waited for, and the data threads end.

    Raises:
      RefusedError: something does not fit, or another run holds the workdir, in one sentence.
    """
    with contextlib.ExitStack() as stack:
        try:
            setup = build(config, workdir)
            images = open_images(setup)
            stack.callback(images.iterator.close)
            check_agreement(describe_facts(setup))
            check = stack.enter_context(lock_workdir(setup.workdir))
            checkpoints = Checkpoints(setup.workdir, keep=setup.config.train.keep_checkpoints, check=check)
            stack.callback(checkpoints.close)
            restore = functools.partial(checkpoints.restore, iterator=images.iterator, config=setup.flat_config)
            start = make_start(setup, restore)
            check_agreement({"the step to continue from": start.step})
        except (ValueError, OSError) as error:
            raise RefusedError(str(error)) from error
        try:
            yield Prepared(setup, checkpoints, images, start)
        except BaseException as error:
            report_failure(error)  # closing the checkpoints would wait for the other processes
            raise


def train_and_evaluate(
    config,
    workdir: str | os.PathLike,
    *,
    profile: tuple[int, int] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict:
    """Train in a workdir to the last step or to a signal, or continue there; return the result.

    The result is that of result.json: the metrics of the last step, of the averaged variables if there are any. A
    finished run returns the result it has; a stopped run returns {"stopped": the signal, "step": steps done}.

    Args:
      config: a config as `configs/base.py` makes it.
      workdir: the folder of the run; made if it does not exist.
      profile: the first and the last step to trace into WORKDIR/profile.
      seconds: parts of the start before this call, as {"import": 2.1}, for the log and startup.json.

    Raises:
      RefusedError: the run cannot begin.
      NonFiniteError: a loss or a gradient is not finite; the checkpoints of the steps before it stay.
      UnreadableImageError: an image cannot be decoded, unless data.on_error is "skip".
    """
    if profile and is_bucket(as_path(workdir)):
        raise RefusedError(f"--profile writes to a local folder and --workdir is {workdir}; give a local one")
    with prepare(config, workdir) as run:
        setup, start = run.setup, run.start
        if result := read_result(setup, start.step):
            logging.info("%s is finished; more train.epochs or train.steps continue it", workdir)
            return result
        if start.step:
            logging.info("continuing %s from step %s", workdir, f"{start.step:,}")
        describe_workdir(setup, start.step)
        return _train(run, profile=profile, seconds={**(seconds or {}), "data": setup.seconds, "init": start.seconds})


def _train(run: Prepared, *, profile: tuple[int, int] | None, seconds: dict[str, float]) -> dict:
    """Train a prepared run; return its result, or the signal that stopped it."""
    setup, checkpoints, task, start = run
    start = with_first_ranges(setup, task, start)
    progress = make_progress(setup, start.step)
    writer = MetricsWriter(setup.workdir, start_step=start.step, active=jax.process_index() == 0)
    if setup.config.train.cache_features:
        task = open_features(setup, task, start.state)
        seconds["features"] = task.seconds
    profiler = Profiler(profile, setup.workdir / "profile")
    with contextlib.closing(task.iterator), writer, progress, profiler, StopSignals() as signals:
        log = Log(setup, start, writer, progress)
        end = train(
            setup,
            task,
            start,
            log=log,
            checkpoints=checkpoints,
            profiler=profiler,
            signals=signals,
            seconds=seconds,
        )
    if end.stopped:
        return {"stopped": signals.received or "a signal to another process", "step": int(end.state.step)}
    evaluation = end.evaluation or make_evaluator(task, setup.mesh)(end.state)
    return write_result(setup, end.state, evaluation, log)


def with_first_ranges(setup: Setup, task: Task, start: Start) -> Start:
    """Return the start of a run; before the first step of an int8 network, with measured ranges."""
    if setup.config.train.quantize is None or start.step:
        return start
    return replace(start, state=calibrate_ranges(setup, task, start.state))


def make_progress(setup: Setup, start_step: int) -> Progress:
    """Return the progress of a run, which the first process shows."""
    return Progress(
        setup.plan.total_steps,
        steps_per_epoch=setup.plan.steps_per_epoch,
        batch_size=setup.config.data.batch_size,
        start_step=start_step,
        active=jax.process_index() == 0,
    )


def describe_workdir(setup: Setup, step: int) -> None:
    """Write config.json and environment.json, from the first process.

    If a run continues with another config at `step`, the config before it stays as config.STEP.json.
    """
    if jax.process_index() != 0:
        return
    file = setup.workdir / "config.json"
    if step and file.exists() and _is_other_json(file.read_bytes(), setup.flat_config):
        before = setup.workdir / f"config.{step}.json"
        write_atomic(before, file.read_bytes())
        logging.info("the config has changed; the one before it is in %s", before)
    write_json_atomic(file, setup.flat_config)
    devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    write_json_atomic(setup.workdir / "environment.json", environment(devices))


def _is_other_json(data: bytes, value: dict) -> bool:
    try:
        return json.loads(data) != value
    except ValueError:  # damaged, and kept too
        return True


def evaluate_run(config, workdir: str | os.PathLike) -> dict:
    """Return {"step": steps done} and exact metrics of the newest checkpoint: "eval/top1" ..., averaged "eval_ema/...".

    This writes nothing, so a run may train in the workdir at the same time. A teacher is not needed, and not loaded.

    Raises:
      RefusedError: the config, the data or the checkpoint does not fit.
      FileNotFoundError: the workdir has no checkpoint, and config.init names no weights.
      UnreadableImageError: an image cannot be decoded.
    """
    config = config.copy_and_resolve_references()
    config.train.distill.weights = ""
    with contextlib.ExitStack() as stack:
        try:
            setup = build(config, workdir)
            images = open_images(setup)
            stack.callback(images.iterator.close)
            start = make_start(setup, functools.partial(read_state, setup.workdir, config=setup.flat_config))
        except (ValueError, OSError) as error:
            raise RefusedError(str(error)) from error
        if start.step == 0 and not setup.config.init:
            raise FileNotFoundError(f"{workdir} has no checkpoint to evaluate; train first, or set config.init")
        start = with_first_ranges(setup, images, start)
    return {"step": start.step, **make_evaluator(images, setup.mesh)(start.state).metrics}
