"""Signals that ask a run to stop."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignals:
    """Within this context SIGTERM and SIGINT ask for a stop after the current step; a second one interrupts at once."""

    def __init__(self):
        self.received: str | None = None
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

    def should_stop(self, *, may_ask: bool) -> bool:
        """Return whether a signal arrived, at any process.

        Several processes have to agree. They ask each other only where `may_ask` is true, which must be at the same
        steps on all of them.
        """
        if jax.process_count() == 1:
            return self.received is not None
        return may_ask and bool(np.any(multihost_utils.process_allgather(np.array(self.received is not None))))
