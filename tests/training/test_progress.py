import sys
import time

import pytest

from mobilenet_jax.training import progress as progress_module
from mobilenet_jax.training.progress import Progress


class _Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_rate_leaves_out_compilation_and_pauses_and_eta_counts_pauses(clock, capsys):
    with Progress(1000, steps_per_epoch=100, batch_size=64) as progress:
        clock.now += 60  # compilation, before the first step is done
        progress.update(1, {"loss": 2.0})
        assert progress.images_per_second is None
        clock.now += 20
        progress.update(101, {"loss": 1.5, "top1": 0.25})
        assert progress.images_per_second == pytest.approx(100 * 64 / 20)
        with progress.paused():
            clock.now += 20
        clock.now += 20
        progress.update(201, {"loss": 1.0, "top1": 0.5})
        assert progress.images_per_second == pytest.approx(200 * 64 / 40)
    assert capsys.readouterr().err.splitlines() == [
        "step 1/1,000, epoch 0.01: loss 2",
        "step 101/1,000, epoch 1.01: loss 1.5, top1 0.25, 320 images/s, 02:59 left",
        "step 201/1,000, epoch 2.01: loss 1, top1 0.5, 320 images/s, 03:59 left",
    ]


def test_lines_come_at_most_every_ten_seconds_and_at_the_end_and_for_reports(clock, capsys):
    with Progress(100, steps_per_epoch=10, batch_size=1, start_step=50) as progress:
        for step in range(51, 101):
            progress.update(step, {"loss": 1.0})
            if step == 60:
                progress.report(step, {"eval/top1": 0.9})
            clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [51, 60, 61, 71, 81, 91, 100]
    assert lines[1] == "step 60/100, epoch 6.00: eval/top1 0.9"


def test_terminal_gets_a_bar_with_the_values_and_the_rate(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(1000, steps_per_epoch=100, batch_size=64) as progress:
        progress.update(1, {"loss": 2.0})
        clock.now += 20
        progress.update(101, {"loss": 1.5})
        progress.report(101, {"eval/top1": 0.9})
        time.sleep(0.15)  # tqdm draws at most every 0.1 s
        progress.update(102, {"loss": 1.25})
    text = capsys.readouterr().err
    assert "102/1000, loss 1.25, 323 images/s, 02:57 left" in text
    assert "step 101/1,000, epoch 1.01: eval/top1 0.9\n" in text


def test_inactive_progress_is_silent_but_keeps_the_rate(clock, capsys):
    with Progress(10, steps_per_epoch=1, batch_size=8, active=False) as progress:
        progress.update(1, {"loss": 1.0})
        clock.now += 2
        progress.update(5, {"loss": 1.0})
        progress.report(5, {"top1": 1.0})
    assert progress.images_per_second == 16
    assert capsys.readouterr().err == ""
