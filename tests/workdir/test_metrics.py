import errno
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilenet_jax.workdir import metrics
from mobilenet_jax.workdir.metrics import Mean, MetricsWriter, read_metrics


def test_mean_divides_sums_by_counts_once():
    mean = Mean()
    mean.update({"loss": (np.float32(3.0), 4), "top1": (1, 4)})
    mean.update({"loss": (1.0, 1)})
    assert mean.compute() == {"loss": 4.0 / 5, "top1": 0.25}


def test_mean_goes_on_after_json_as_if_nothing_had_happened():
    sums = np.random.default_rng(0).normal(size=50).astype(np.float32)
    whole, first, second = Mean(), Mean(), Mean()
    for i, value in enumerate(sums):
        whole.update({"loss": (value, 7)})
        (first if i < 23 else second).update({"loss": (value, 7)})
        if i == 22:
            second.update({"loss": (1e9, 1), "forgotten": (1, 1)})
            second.restore(json.loads(json.dumps(first.state())))
    assert second.compute() == whole.compute()
    assert second.state() == whole.state()


def test_mean_of_no_example_is_an_error():
    mean = Mean()
    mean.update({"eval/loss": (0.0, 0)})
    with pytest.raises(ValueError, match="eval/loss has no mean"):
        mean.compute()


event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # generated: no types


def _values(step):
    """Values with all their digits, as float32 and as Python numbers."""
    return {"epoch": step / 3, "train/loss": np.float32(1 / (step + 1)), "eval/count": np.int64(360 + step)}


def _write(workdir, steps, start_step):
    with MetricsWriter(workdir, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, _values(step))


def test_numbers_come_back_to_the_bit(tmp_path):
    _write(tmp_path, range(1, 50), 0)
    for step, line in enumerate(read_metrics(tmp_path), start=1):
        assert line == {"step": step, **_values(step)}
        assert list(line) == ["step", "epoch", "train/loss", "eval/count"]
        assert isinstance(line["eval/count"], int)


def test_what_is_not_finite_is_null_and_valid_json(tmp_path):
    with MetricsWriter(tmp_path, start_step=0) as writer:
        writer.write(1, {"train/loss": np.float32("nan"), "rate": math.inf, "note": "diverged"})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "train/loss": None, "rate": None, "note": "diverged"}


def test_file_cut_at_any_byte_is_resumed_with_each_step_once(tmp_path, monkeypatch):
    """A run killed at that byte resumes from the last checkpoint whose lines are all in the file."""
    monkeypatch.setattr(metrics, "SummaryWriter", _NoEvents)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of waits for the disk
    _write(tmp_path, range(1, 4), 0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        for start_step in {0, complete // 2, complete}:
            path.write_bytes(whole[:cut])
            _write(tmp_path, range(start_step + 1, 4), start_step)
            assert path.read_bytes() == whole, f"cut at byte {cut}, resumed at step {start_step}"


class _NoEvents:
    """Stands in for the event files, whose thread is slow to start, in a test that opens hundreds."""

    def __init__(self, *_, **__):
        pass

    def add_scalar(self, *_):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def test_killed_process_leaves_every_line_it_wrote(tmp_path):
    script = """
import os, signal, sys
from mobilenet_jax.workdir.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], start_step=0)
for step in range(1, 8):
    writer.write(step, {"train/loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsWriter(tmp_path, start_step=0) as writer, monkeypatch.context() as patch:
        writer.write(1, {"train/loss": 1.0})
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: the disk is full .* MB are free"):
            writer.flush()


def test_a_step_cannot_be_written_twice(tmp_path):
    _write(tmp_path, [1, 2, 3], 0)
    with (
        MetricsWriter(tmp_path, start_step=2) as writer,
        pytest.raises(ValueError, match="metrics of step 2 come after those of step 2"),
    ):
        writer.write(2, {})


def test_last_line_that_is_being_written_is_not_read(tmp_path):
    _write(tmp_path, [1, 2], 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', "", "\0\0\0"])
def test_damage_in_the_middle_is_an_error_to_a_reader(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{\n{"step": 3}\n', [1, 3]),
        ("\0" * 100, [1]),
        ('\0\0\0\n{"step": 2}\n', [1, 2]),
        ('{"step": 2}\n\xff\n', [1, 2]),
    ],
)
def test_a_run_sets_damaged_lines_aside_and_goes_on(tmp_path, caplog, tail, kept):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + tail)
    (tmp_path / "metrics.jsonl.damaged").write_text("of an older crash\n")
    _write(tmp_path, [5], 4)
    assert "metrics.jsonl is damaged; the run goes on without line" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path)] == [*kept, 5]
    aside = (tmp_path / "metrics.jsonl.damaged").read_text().splitlines()
    assert aside[0] == "of an older crash"
    assert aside[1:] == [line for line in tail.splitlines() if not line.startswith('{"step"')]


def test_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_inactive_writer_leaves_no_trace(tmp_path):
    with MetricsWriter(tmp_path / "run", start_step=0, active=False) as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()


def _read_events(path: Path) -> list:
    """TFRecord: length (8 bytes), checksum (4), data, checksum (4)."""
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_event_files_hold_the_scalars_and_purge_what_is_resumed(tmp_path):
    _write(tmp_path, range(1, 6), 0)
    _write(tmp_path, range(4, 6), 3)
    first, second = (_read_events(path) for path in sorted(tmp_path.glob("events.*")))
    scalars = [(e.step, v.tag, v.simple_value) for e in first for v in e.summary.value]
    assert scalars == [
        (step, tag, pytest.approx(value)) for step in range(1, 6) for tag, value in _values(step).items()
    ]
    purge = [e.step for e in second if e.session_log.status == event_pb2.SessionLog.START]
    assert purge == [4]  # TensorBoard forgets steps from 4 on that the first file has
    assert {e.step for e in second if e.summary.value} == {4, 5}
