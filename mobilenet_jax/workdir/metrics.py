"""The metrics of a run: means, metrics.jsonl and TensorBoard events.

Nothing here touches a device: values are Python or NumPy numbers.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import numpy as np
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter

from mobilenet_jax.paths import as_path, is_bucket
from mobilenet_jax.workdir.files import naming_a_full_disk, write_atomic

METRICS_FILE = "metrics.jsonl"


class Mean:
    """Means over examples, kept as (sum, count) until they are read, so that each is divided once.

    The state is plain data that JSON keeps to the bit, so that a resumed run logs the same means.
    """

    def __init__(self):
        self._totals: dict[str, tuple[float, float]] = {}

    def update(self, sums: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> None:
        """Add {name: (sum, count)}, numbers of any type, in double precision."""
        for name, (total, count) in sums.items():
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + float(total), old_count + float(count))

    def compute(self) -> dict[str, float]:
        """Return {name: sum / count}; raise ValueError if the count of a name is 0."""
        for name, (_, count) in self._totals.items():
            if not count:
                raise ValueError(f"{name} has no mean: not one example was counted")
        return {name: total / count for name, (total, count) in self._totals.items()}

    def state(self) -> dict[str, list[float]]:
        """Return {name: [sum, count]}, for a checkpoint."""
        return {name: list(pair) for name, pair in self._totals.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Replace everything by a `state()`."""
        self._totals = {name: (total, count) for name, (total, count) in state.items()}


class MetricsWriter:
    """Writes metrics to WORKDIR/metrics.jsonl and to TensorBoard event files, each step once. A context manager.

    A resumed run drops what a killed run wrote after the checkpoint: lines of later steps and an incomplete last line
    are removed from the file atomically, and TensorBoard purges the events of later steps. Lines that a crash of the
    machine has damaged are moved to metrics.jsonl.damaged, with a warning.

    Objects in a bucket cannot grow. For a workdir in a bucket, both files are kept in a local folder and written whole
    at each `flush`, which is before each checkpoint.

    Args:
      workdir: a folder, created if it is missing.
      start_step: the number of steps completed: 0 in a new run, the checkpoint's step in a resumed one.
      active: if False, every method does nothing. Only the first process is active.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        self._workdir = as_path(workdir)
        self._path = path = self._workdir / METRICS_FILE
        lines, damaged = _parse_lines(path) if path.exists() else ([], {})
        if damaged:
            _set_aside(path, damaged)
        kept = [line for line in lines if line["step"] <= start_step]
        self._step = kept[-1]["step"] if kept else -1
        self._stage = tempfile.TemporaryDirectory() if is_bucket(path) else None
        local = epath.Path(self._stage.name) if self._stage else self._workdir
        local.mkdir(parents=True, exist_ok=True)
        write_atomic(local / METRICS_FILE, "".join(map(_encode, kept)))
        self._file = open(local / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115
        # Without the suffix, a run that is resumed within a second would overwrite the older file.
        self._events = SummaryWriter(str(local), purge_step=start_step + 1, filename_suffix=f".{time.time_ns()}")

    def write(self, step: int, values: Mapping[str, SupportsFloat | str | None]) -> None:
        """Append one line, {"step": step, **values}, and pass it to the operating system at once.

        Numbers keep every bit; a float32 becomes the double of the same value. JSON has no numbers that are not finite,
        so they are written as null. Numbers also go to TensorBoard under their names.

        Raises:
          ValueError: the step is not after the last one, because the file has each step once.
        """
        if not self._active:
            return
        if step <= self._step:
            raise ValueError(f"metrics of step {step} come after those of step {self._step}")
        plain = {
            name: value if isinstance(value, str | None) else np.asarray(value).item() for name, value in values.items()
        }
        with naming_a_full_disk(self._path):
            self._file.write(_encode({"step": int(step), **plain}))
            self._file.flush()  # the buffer holds one whole line, so this is one system call
        self._step = int(step)
        for name, value in plain.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write all lines to disk. Call it before a checkpoint of the same step is saved."""
        if self._active:
            with naming_a_full_disk(self._path):
                os.fsync(self._file.fileno())
                self._events.flush()
            if self._stage:
                for file in epath.Path(self._stage.name).iterdir():
                    write_atomic(self._workdir / file.name, file.read_bytes())

    def close(self) -> None:
        """Flush and close both files."""
        if self._active:
            with naming_a_full_disk(self._path):
                self.flush()
                self._file.close()
                self._events.close()
            if self._stage:
                self._stage.cleanup()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """Return the lines of WORKDIR/metrics.jsonl in order, without an incomplete last line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line before the last is no metrics line.
    """
    path = as_path(workdir) / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{workdir} has no {METRICS_FILE}: it is not the workdir of a run")
    lines, damaged = _parse_lines(path)
    for number, line in damaged.items():
        raise ValueError(f"{path}, line {number}: not the metrics of a step: {line[:80]!r}")
    return lines


def _parse_lines(path: epath.Path) -> tuple[list[dict], dict[int, str]]:
    """Return the metrics, and {number: line} of the damaged lines. A last line that was cut off is in neither."""
    *lines, last = path.read_bytes().decode(errors="replace").split("\n")
    if "\0" in last:  # blocks that the file system had promised and never wrote
        lines.append(last)
    parsed, damaged = [], {}
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            _ = values["step"] + 0
        except (ValueError, TypeError, KeyError):
            damaged[number] = line
        else:
            parsed.append(values)
    return parsed, damaged


def _set_aside(path: epath.Path, damaged: Mapping[int, str]) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    before = aside.read_text() if aside.exists() else ""
    write_atomic(aside, before + "".join(f"{line}\n" for line in damaged.values()))
    numbers = ", ".join(map(str, damaged))
    logging.warning("%s is damaged; the run goes on without line %s, which is now in %s", path, numbers, aside)


def _encode(values: Mapping) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
