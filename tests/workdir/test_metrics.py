import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilenet_jax.training.progress import Progress
from mobilenet_jax.workdir import metrics
from mobilenet_jax.workdir.environment import environment
from mobilenet_jax.workdir.files import write_json_atomic
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
    """As after a kill at that byte, resumed from the last checkpoint whose lines are all there."""
    monkeypatch.setattr(metrics, "SummaryWriter", _NoEvents)
    _write(tmp_path, range(1, 6), 0)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        for start_step in {0, complete // 2, complete}:
            path.write_bytes(whole[:cut])
            _write(tmp_path, range(start_step + 1, 6), start_step)
            assert path.read_bytes() == whole, f"cut at byte {cut}, resumed at step {start_step}"


class _NoEvents:
    """In place of the event files, whose thread is slow to start, in a test of hundreds of openings."""

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
from mobilenet_jax.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1], start_step=0)
for step in range(1, 8):
    writer.write(step, {"train/loss": 1 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    assert not list(tmp_path.glob("*.tmp"))


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


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', ""])
def test_damage_in_the_middle_is_an_error(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (read_metrics, lambda workdir: MetricsWriter(workdir, start_step=1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read(tmp_path)


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


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json_atomic(path, {"top1": 0.1, "name": "v2"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"top1": math.nan})
    assert json.loads(path.read_text()) == {"top1": 0.1, "name": "v2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


class _Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(metrics, "time", clock)
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


def test_environment_names_versions_devices_and_commit():
    found = environment(["TFRT_CPU_0"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["numpy"] == np.__version__
    assert found["devices"] == ["TFRT_CPU_0"]
    assert found["cpu"]
    json.dumps(found, allow_nan=False)


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_or_none(tmp_path, monkeypatch):
    module = tmp_path / "metrics.py"
    module.write_text("# the module\n")
    monkeypatch.setattr(metrics, "__file__", str(module))
    _git(tmp_path, "init")
    assert environment([])["commit"] is None  # a repository it does not belong to
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert environment([])["commit"] == commit
    module.write_text("# changed\n")
    assert environment([])["commit"] == commit + "+changes"
