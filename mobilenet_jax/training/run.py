"""A run: build, start, loop, result."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging

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
from mobilenet_jax.training.task import Task, open_features, open_images
from mobilenet_jax.workdir.checkpoint import Checkpoints
from mobilenet_jax.workdir.environment import environment
from mobilenet_jax.workdir.files import write_json_atomic
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
def prepare(config, workdir: str | Path) -> Iterator[Prepared]:
    """Check a config against data, devices and the checkpoints of a workdir; compile nothing.

    On leaving the context, checkpoints that are being written are waited for, and the data threads end.

    Raises:
      RefusedError: something does not fit, in one sentence.
    """
    with contextlib.ExitStack() as stack:
        try:
            setup = build(config, workdir)
            images = open_images(setup)
            stack.callback(images.iterator.close)
            check_agreement(describe_facts(setup))
            checkpoints = Checkpoints(setup.workdir, keep=setup.config.train.keep_checkpoints)
            stack.callback(checkpoints.close)
            start = make_start(setup, checkpoints, images.iterator)
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
    workdir: str | Path,
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
    with prepare(config, workdir) as run:
        setup, checkpoints, images, start = run
        if result := read_result(setup, start.step):
            logging.info("%s is finished; more train.epochs or train.steps continue it", workdir)
            return result
        if start.step:
            logging.info("continuing %s from step %s", workdir, f"{start.step:,}")
        describe_workdir(setup)
        is_first = jax.process_index() == 0
        progress = Progress(
            setup.plan.total_steps,
            steps_per_epoch=setup.plan.steps_per_epoch,
            batch_size=setup.config.data.batch_size,
            start_step=start.step,
            active=is_first,
        )
        writer = MetricsWriter(setup.workdir, start_step=start.step, active=is_first)
        parts = {**(seconds or {}), "data": setup.seconds, "init": start.seconds}
        task = images
        if setup.config.train.cache_features:
            task = open_features(setup, images, start.state)
            parts["features"] = task.seconds
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
                seconds=parts,
            )
        if end.stopped:
            return {"stopped": signals.received or "a signal to another process", "step": int(end.state.step)}
        evaluation = end.evaluation or make_evaluator(task, setup.mesh)(end.state)
        return write_result(setup, end.state, evaluation, log)


def describe_workdir(setup: Setup) -> None:
    """Write config.json and environment.json, from the first process."""
    if jax.process_index() == 0:
        write_json_atomic(setup.workdir / "config.json", setup.flat_config)
        devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
        write_json_atomic(setup.workdir / "environment.json", environment(devices))


def evaluate_run(config, workdir: str | Path) -> dict:
    """Return {"step": steps done} and exact metrics of the newest checkpoint: "eval/top1" ..., averaged "eval_ema/...".

    Raises:
      RefusedError: the config, the data or the checkpoints do not fit.
      FileNotFoundError: the workdir has no checkpoint, and config.init names no weights.
      UnreadableImageError: an image cannot be decoded.
    """
    with prepare(config, workdir) as (setup, _, images, start):
        if start.step == 0 and not setup.config.init:
            raise FileNotFoundError(f"{workdir} has no checkpoint to evaluate; train first, or set config.init")
        return {"step": start.step, **make_evaluator(images, setup.mesh)(start.state).metrics}
