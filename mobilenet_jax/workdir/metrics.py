"""What a run writes down: means, metrics.jsonl and TensorBoard events, progress, and its environment.

Nothing here touches a device; values arrive as Python or NumPy numbers.
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
    """Means over examples, kept as (sum, count) until they are read: the division happens once.

    The state is plain data and goes through JSON to the bit, so that a resumed run logs the very same means.
    """

    def __init__(self):
        self._totals: dict[str, tuple[float, float]] = {}

    def update(self, sums: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> None:
        """Adds {name: (sum, count)}; numbers of any kind, added up in double precision."""
        for name, (total, count) in sums.items():
            old_total, old_count = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_total + float(total), old_count + float(count))

    def compute(self) -> dict[str, float]:
        """{name: sum / count} of all that was added; ValueError where the count of a name is 0."""
        for name, (_, count) in self._totals.items():
            if not count:
                raise ValueError(f"{name} has no mean: not one example was counted")
        return {name: total / count for name, (total, count) in self._totals.items()}

    def state(self) -> dict[str, list[float]]:
        """{name: [sum, count]}, for a checkpoint."""
        return {name: list(pair) for name, pair in self._totals.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Goes back to a `state()`, whatever was added since."""
        self._totals = {name: (total, count) for name, (total, count) in state.items()}


class MetricsWriter:
    """Writes metrics to WORKDIR/metrics.jsonl and to TensorBoard event files, each step once.

    Opened at the step of a checkpoint it drops what a killed run wrote after it: lines of later steps and a
    torn last line leave the file atomically, TensorBoard purges the events of later steps. A context manager.

    Args:
      workdir: a folder; made where missing.
      start_step: steps completed so far: 0 in a new run, the checkpoint's in a resumed one.
      active: False makes every method do nothing: on all processes but the first.

    Raises:
      ValueError: metrics.jsonl has a line, not the last, that is no metrics line.
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
        # The suffix keeps a run that is resumed within a second from overwriting the file of the one before.
        self._events = SummaryWriter(str(workdir), purge_step=start_step + 1, filename_suffix=f".{time.time_ns()}")

    def write(self, step: int, values: Mapping[str, SupportsFloat | str | None]) -> None:
        """Appends one line, {"step": step, **values}, and hands it to the system at once.

        Numbers keep every bit (float32 as the double of the same value). JSON has no word for what is not
        finite: it is written as null. Numbers also go to TensorBoard under their names.

        Raises:
          ValueError: a step that is not after the last one: each stands in the file once.
        """
        if not self._active:
            return
        if step <= self._step:
            raise ValueError(f"metrics of step {step} come after those of step {self._step}")
        plain = {
            name: value if isinstance(value, str | None) else np.asarray(value).item() for name, value in values.items()
        }
        self._file.write(_encode({"step": int(step), **plain}))
        self._file.flush()  # the line is in the buffer whole: this is one system call
        self._step = int(step)
        for name, value in plain.items():
            if isinstance(value, int | float):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes all lines so far survive a power cut; before a checkpoint of the same step is saved."""
        if self._active:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._active:
            self.flush()
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
    """The lines of WORKDIR/metrics.jsonl in order; a last line that is being written is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another line is no metrics line.
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
            if number == len(lines):  # torn, or the nothing behind the last line break
                break
            raise ValueError(f"{path}, line {number}: no metrics of a step: {line[:80]!r}") from error
        parsed.append(values)
    return parsed


def _encode(values: Mapping) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
