"""Signals that ask a run to stop."""

import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

ASK_SECONDS = 4


class StopSignals:
    """Within this context SIGTERM and SIGINT ask for a stop after the current step; a second one interrupts at once.

    Several processes must stop after the same step, so they ask each other every few seconds. A cloud gives 30 seconds
    between SIGTERM and the end, and the checkpoint needs some of them.
    """

    def __init__(self):
        self.received: str | None = None
        self._interval = self._steps_left = 1  # steps between two questions, and until the next one
        self._asked = time.monotonic()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def should_stop(self) -> bool:
        """Return whether a signal arrived, at any process. Every process must call this once in each step."""
        if jax.process_count() == 1:
            return self.received is not None
        self._steps_left -= 1
        if self._steps_left:
            return False
        seconds = (time.monotonic() - self._asked) / self._interval
        answers = multihost_utils.process_allgather(np.array([self.received is not None, seconds], np.float32))
        stops, slowest = np.asarray(answers).max(axis=0).tolist()
        # All processes have the same answers, so they choose the same step. A fast start must not promise too much.
        fitting = int(ASK_SECONDS / max(slowest, 1e-6))
        self._interval = self._steps_left = min(max(1, fitting), 2 * self._interval)
        self._asked = time.monotonic()
        return bool(stops)
