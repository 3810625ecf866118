import os
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from mobilenet_jax.training import signals
from mobilenet_jax.training.signals import StopSignals


def test_processes_ask_each_other_every_few_seconds_at_the_same_steps(monkeypatch):
    """The other process takes twice as long for a step; a signal reaches this one in the middle."""
    now, asked = [0.0], []

    def gather(mine: np.ndarray) -> np.ndarray:
        asked.append(now[0])
        return np.stack([mine, [0, 2 * mine[1]]])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    with StopSignals() as stop:
        for step in range(10_000):
            now[0] += 0.02
            if step == 5_000:
                sent = now[0]
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.should_stop():
                break
        assert stop.received == "SIGTERM"
    assert now[0] - sent < signals.ASK_SECONDS
    # By the time of the slower process, few questions are asked and none comes late.
    gaps = np.diff(asked)
    assert len(asked) < 60
    assert 1.5 < max(gaps) < 1.01 * signals.ASK_SECONDS / 2


def test_a_slow_step_is_followed_by_a_question(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    asked = []
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda mine: asked.append(now[0]) or np.stack([mine, mine])
    )
    with StopSignals() as stop:
        for _ in range(10):
            now[0] += 5.0
            assert not stop.should_stop()
    assert asked == [5.0 * i for i in range(1, 11)]
