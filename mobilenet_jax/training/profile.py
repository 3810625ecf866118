"""A trace of some steps, for TensorBoard and Perfetto."""

import contextlib
import os
from typing import Any

import jax
from absl import logging


class Profiler:
    """Traces the steps `first` to `last` of a run, counted from 1, into a folder.

    Every step is marked with `jax.profiler.StepTraceAnnotation`, so that a trace started by other means shows the
    steps too. A context manager: a trace that is still open at the end of the run is closed.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: str | os.PathLike):
        """Trace nothing if `steps` is None. Raises ValueError unless 1 <= first <= last."""
        self._first, self._last = steps or (0, 0)
        if steps and not 1 <= self._first <= self._last:
            raise ValueError(f"--profile is {self._first}:{self._last}; valid: START:STOP with 1 <= START <= STOP")
        self._folder, self._running = folder, False

    def step(self, number: int, state: Any) -> contextlib.AbstractContextManager:
        """Return the context of step `number`, which starts from `state`; start or stop the trace before it."""
        if self._running and number > self._last:
            jax.block_until_ready(state)  # the last traced step may still run
            self._stop()
        elif not self._running and self._first <= number <= self._last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        logging.info("profile of steps %d to %d: %s", self._first, self._last, self._folder)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()
