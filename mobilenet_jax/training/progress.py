"""The progress of a long job: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.5


class Progress:
    """Shows progress on stderr: a bar on a terminal, otherwise a line at most every ten seconds.

    The clock starts at the first `update`, so that compilation is not part of the rate. The time inside `paused()`
    counts for the time left but not for the rate. A context manager.

    Args:
      total_steps: steps of the whole run.
      steps_per_epoch: for the epoch shown; need not be whole; None if there are no epochs.
      batch_size: images per step, for the rate.
      start_step: steps done before.
      active: False shows nothing, as on all processes but the first; the rate is measured anyway.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: float | None,
        batch_size: int,
        start_step: int = 0,
        active: bool = True,
    ):
        self._total, self._steps_per_epoch, self._batch_size = total_steps, steps_per_epoch, batch_size
        self._active = active
        self._start: tuple[int, float] | None = None  # (step, seconds) of the first update
        self._paused = 0.0  # seconds since the first update
        self._seconds_left: float | None = None
        self.images_per_second: float | None = None  # at the last update; None before the second
        self._next_line = 0.0  # the time of the next line, or of the next change of the bar
        self._bar = None
        if active and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=start_step, bar_format=layout, dynamic_ncols=True, file=sys.stderr
            )

    def is_due(self) -> bool:
        """Return whether `update` would show something, or start the clock: reading the values costs time."""
        return self._start is None or (self._active and time.monotonic() >= self._next_line)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` steps are done, with their values (loss, accuracy)."""
        now = time.monotonic()
        if self._start is None:
            self._start = (step, now)
        done, seconds = step - self._start[0], now - self._start[1]
        if done:
            self.images_per_second = done * self._batch_size / (seconds - self._paused)
            self._seconds_left = seconds / done * (self._total - step)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._describe(values)), refresh=False)
            self._bar.update(step - self._bar.n)
            self._next_line = now + _SECONDS_BETWEEN_BARS
        elif self._active and (now >= self._next_line or step >= self._total):
            self._next_line = now + _SECONDS_BETWEEN_LINES
            self._print(step, self._describe(values))

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Print a line that stays, at once: the result of an evaluation."""
        if self._active:
            self._print(step, _format(values))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rate: evaluation, saving."""
        before = time.monotonic()
        yield
        if self._start is not None:
            self._paused += time.monotonic() - before

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _describe(self, values: Mapping[str, float]) -> list[str]:
        parts = _format(values)
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:,.0f} images/s")
        if self._seconds_left is not None:
            parts.append(f"{tqdm.format_interval(self._seconds_left)} left")
        return parts

    def _print(self, step: int, parts: Sequence[str]) -> None:
        where = f"{step:,}/{self._total:,}"
        if self._steps_per_epoch is not None:
            where = f"step {where}, epoch {step / self._steps_per_epoch:.2f}"
        tqdm.write(": ".join((where, ", ".join(parts))), file=sys.stderr)


def _format(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]
