"""The log of a run: from the sums of steps to lines of metrics, progress, and the check that all is finite."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mobilenet_jax.training.build import Setup
from mobilenet_jax.training.finite import NonFiniteError, find_non_finite, find_non_finite_leaf
from mobilenet_jax.training.progress import Progress
from mobilenet_jax.training.start import Start
from mobilenet_jax.training.steps import Sums
from mobilenet_jax.workdir.metrics import Mean, MetricsWriter


class Log:
    """Accumulates the sums of steps and writes a line of metrics where the plan wants one.

    The sums stay on the device until a line is written, a host that is alone shows progress, or `read` is called. One
    transfer then fetches the sums of all steps since the last one, while the next step runs.
    """

    def __init__(self, setup: Setup, start: Start, writer: MetricsWriter, progress: Progress):
        self._plan, self._schedule = setup.plan, setup.schedule
        self._writer, self._progress = writer, progress
        self._means = Mean()
        self._means.restore(start.means)
        self.skipped = start.skipped  # unreadable images that all processes skipped since the start of the run
        # (step, sums, skipped) of the steps whose sums were not fetched yet
        self._pending: list[tuple[int, Sums, int | jax.Array]] = []
        self._first = start.step + 1
        self._waited, self._line_start = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave the time inside out of the training rate: compilation, evaluation, saving."""
        return self._progress.paused()

    def restart_line(self) -> float:
        """Start the clock of the next line, and return the seconds that were spent waiting for data."""
        waited, self._waited, self._line_start = self._waited, 0.0, time.perf_counter()
        return waited

    def add(self, step: int, sums: Sums, skipped: int | jax.Array) -> None:
        """Take the sums of a step that may still run; if the line of the step before it is due, write that line."""
        if self._pending:
            previous, running, _ = self._pending[-1]
            # One step may run ahead of the host. If more did, their batches would fill the device's memory.
            jax.block_until_ready(running)
            due = self._plan.is_due(previous, self._plan.log_every)
            # A loss that is not finite ends the host that reads it, so several hosts read at the same steps.
            shows = self._progress.is_due() if jax.process_count() == 1 else previous == self._first
            if due or shows:
                self.read()
            if due:
                self.write(previous)
        self._pending.append((step, sums, skipped))

    def read(self) -> None:
        """Wait for the step added last, and count all steps that were not counted.

        Raises NonFiniteError for the first step whose loss or gradient is not finite.
        """
        if not self._pending:
            return
        steps, *running = zip(*self._pending, strict=True)
        self._pending = []
        fetched, skipped = jax.device_get(running)
        for step, sums in zip(steps, fetched, strict=True):
            if what := find_non_finite({name: sums[name][0] for name in ("loss", "grad_norm")}):
                raise NonFiniteError(what, step, self.learning_rate(step))
            self._means.update(sums)
        self.skipped += int(sum(skipped))
        last = fetched[-1]
        self._progress.update(steps[-1], {name: last[name][0] / last[name][1] for name in ("loss", "top1")})

    def write(self, step: int, evaluation: dict[str, float] | None = None) -> None:
        """Write a line: means over the steps since the last line, and the metrics of an evaluation if there was one."""
        means = {f"train/{name}": value for name, value in self._means.compute().items()}
        seconds = time.perf_counter() - self._line_start
        values = {
            "epoch": step / self._plan.steps_per_epoch,
            **means,
            "train/lr": self.learning_rate(step),
            "data/skipped": self.skipped,
            **(evaluation or {}),
            "time/images_per_second": self._progress.images_per_second,
            "time/data_wait": self._waited / seconds,
        }
        self._writer.write(step, values)
        if evaluation:
            shown = {name: evaluation[name] for name in evaluation if name.endswith(("loss", "top1"))}
            self._progress.report(step, {"train/loss": means["train/loss"], **shown})
        self._means.restore({})
        self.restart_line()

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that made `step` steps of `step - 1`."""
        with jax.transfer_guard("allow"):  # a few numbers, once for each line
            return np.asarray(self._schedule(step - 1)).item()

    def seal(self, step: int, state: Any) -> dict:
        """Make all lines durable, and return what a checkpoint of `state` must hold of this log.

        Raises NonFiniteError if an array of the state is not finite: such a state is never saved.
        """
        if what := find_non_finite_leaf(state):
            raise NonFiniteError(what, step, self.learning_rate(step))
        self._writer.flush()
        return {"train": self._means.state(), "skipped": self.skipped}
