"""What moves between the host and the devices while a run trains."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import make_config

from mobilenet_jax.training import loop, progress
from mobilenet_jax.training.log import Log
from mobilenet_jax.training.plan import Plan
from mobilenet_jax.training.progress import Progress
from mobilenet_jax.training.run import train_and_evaluate
from mobilenet_jax.workdir.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


class Spy:
    """A number on the device. It notes how many steps had been started when the host read it."""

    def __init__(self, value: jax.Array, started: list[int], reads: dict[int, set[int]]):
        self._value, self._step, self._started, self._reads = value, len(started), started, reads

    def block_until_ready(self) -> "Spy":
        self._value.block_until_ready()
        return self

    def __array__(self, *args, **kwargs) -> np.ndarray:
        self._reads.setdefault(len(self._started), set()).add(self._step)
        return np.asarray(self._value, *args, **kwargs)


def test_a_step_begins_when_the_one_before_has_ended(tmp_path, monkeypatch):
    """On a CPU each step in the queue holds its buffers."""
    compile_step, ended, last = loop.compile_step, [], []

    def compile_with_spy(*arguments, **phase):
        compiled, seconds = compile_step(*arguments, **phase)

        def step(state, batch, key):
            ended.append(all(array.is_ready() for array in last))
            state, sums = compiled(state, batch, key)
            last[:] = jax.tree.leaves(sums)
            return state, sums

        return step, seconds

    monkeypatch.setattr(loop, "compile_step", compile_with_spy)
    values = {"train__log_every_steps": 100, "train__save_every_epochs": 0.0, "train__eval_every_epochs": 0.0}
    train_and_evaluate(make_config(train__steps=6, data__image_size=64, **values), tmp_path)
    assert ended == [True] * 6


def test_the_loop_moves_batches_in_and_one_group_of_sums_out_for_each_line(tmp_path, monkeypatch):
    """The guard lets `device_put` pass and nothing else. A CPU does not guard what the host reads: the spies see it."""
    started, reads, compile_step = [], {}, loop.compile_step

    def compile_with_spies(*arguments, **phase):
        compiled, seconds = compile_step(*arguments, **phase)

        def step(state, batch, key):
            with jax.transfer_guard("disallow"):
                state, sums = compiled(state, batch, key)
            started.append(len(started))
            return state, jax.tree.map(lambda value: Spy(value, started, reads), sums)

        return step, seconds

    original = loop.train

    def guarded(*arguments, **rest):
        with jax.transfer_guard_host_to_device("disallow"):
            return original(*arguments, **rest)

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 1e9)
    monkeypatch.setattr(loop, "compile_step", compile_with_spies)
    monkeypatch.setattr("mobilenet_jax.training.run.train", guarded)
    settings = {"train__log_every_steps": 5, "train__eval_every_epochs": 0.0, "train__save_every_epochs": 0.0}
    train_and_evaluate(make_config(train__steps=13, **settings), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 10, 13]
    # The first step starts the clock of the progress. A line is written while the next step runs.
    assert reads == {2: {1}, 6: {2, 3, 4, 5}, 11: {6, 7, 8, 9, 10}, 13: {11, 12, 13}}


def test_several_hosts_read_at_the_same_steps(tmp_path, monkeypatch):
    """The first host alone shows progress. If it read more often, it would meet a bad loss before the others."""
    reads = []
    monkeypatch.setattr("mobilenet_jax.training.log.jax.process_count", lambda: 2)
    monkeypatch.setattr("mobilenet_jax.training.log.jax.device_get", lambda group: reads.append(len(group[0])) or group)
    plan = Plan(
        total_steps=9,
        steps_per_epoch=9,
        eval_every=9,
        save_every=9,
        log_every=4,
        freeze_steps=9,
        stats_batches=0,
        range_steps=9,
    )
    for active in (True, False):
        progress = Progress(9, steps_per_epoch=None, batch_size=1, active=active)
        monkeypatch.setattr(progress, "is_due", lambda active=active: active)
        setup: Any = SimpleNamespace(plan=plan, schedule=lambda step: 0.1)
        start: Any = SimpleNamespace(means={}, skipped=0, step=0)
        with MetricsWriter(tmp_path / str(active), start_step=0, active=active) as writer:
            log = Log(setup, start, writer, progress)
            for step in range(1, 10):
                log.add(step, dict.fromkeys(("loss", "top1", "grad_norm"), (jnp.ones(()), jnp.ones(()))), 0)
    assert reads == [1, 3, 4] * 2
