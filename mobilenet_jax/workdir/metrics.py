"""The metrics of a run: means, metrics.jsonl and TensorBoard events.

Nothing here touches a device: values are Python or NumPy numbers.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

import numpy as np
from tensorboardX import SummaryWriter

from mobilenet_jax.workdir.files import write_atomic

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
    are removed from the file atomically, and TensorBoard purges the events of later steps.

    Args:
      workdir: a folder, created if it is missing.
      start_step: the number of steps completed: 0 in a new run, the checkpoint's step in a resumed one.
      active: if False, every method does nothing. Only the first process is active.

    Raises:
      ValueError: a line of metrics.jsonl before the last is no metrics line.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        path = Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _parse_lines(path) if line["step"] <= start_step] if path.exists() else []
        self._step = kept[-1]["step"] if kept else -1
        write_atomic(path, "".join(map(_encode, kept)))
        self._file = path.open("a", encoding="utf-8")
        # Without the suffix, a run that is resumed within a second would overwrite the older file.
        self._events = SummaryWriter(str(workdir), purge_step=start_step + 1, filename_suffix=f".{time.time_ns()}")

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
        self._file.write(_encode({"step": int(step), **plain}))
        self._file.flush()  # the buffer holds one whole line, so this is one system call
        self._step = int(step)
        for name, value in plain.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write all lines to disk. Call it before a checkpoint of the same step is saved."""
        if self._active:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        if self._active:
            self.flush()
            self._file.close()
            self._events.close()

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
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{workdir} has no {METRICS_FILE}: it is not the workdir of a run")
    return _parse_lines(path)


def _parse_lines(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            _ = values["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # incomplete, or empty after the last line break
                break
            raise ValueError(f"{path}, line {number}: not the metrics of a step: {line[:80]!r}") from error
        parsed.append(values)
    return parsed


def _encode(values: Mapping) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
