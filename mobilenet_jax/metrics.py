"""What a run writes down: means, metrics.jsonl and TensorBoard events, progress, and its environment.

Nothing here touches a device; values arrive as Python or NumPy numbers.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "mobilenet_jax",
)


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
        write_text_atomic(path, "".join(map(_encode, kept)))
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


def write_json_atomic(path: str | os.PathLike, obj) -> None:
    """Writes indented JSON such that at any moment the file is the old one or the new one, on disk.

    Raises:
      ValueError, TypeError: the object has no JSON form; numbers that are not finite have none.
    """
    write_text_atomic(Path(path), json.dumps(obj, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 such that at any moment the file is the old one or the new one, on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


class Progress:
    """Shows a run: a bar on a terminal, elsewhere a line at most every ten seconds, both on stderr.

    The clock starts at the first `update`: the compilation before it is in no rate. Time inside `paused()`
    counts for the time left but not for the rate. A context manager.

    Args:
      total_steps: of the whole run.
      steps_per_epoch: for the epoch shown; need not be whole; None where there are no epochs.
      batch_size: images a step, for the rate.
      start_step: steps completed before this run.
      active: False shows nothing (on all processes but the first); the rate is kept all the same.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: float | None,
        batch_size: int,
        start_step: int = 0,
        active: bool = True,
    ):
        self._total, self._steps_per_epoch, self._batch_size = total_steps, steps_per_epoch, batch_size
        self._active = active
        self._start: tuple[int, float] | None = None  # (step, seconds) of the first update
        self._paused = 0.0  # seconds since the first update
        self._seconds_left: float | None = None
        self.images_per_second: float | None = None  # as of the last update; none before the second
        self._next_line = 0.0
        self._bar = None
        if active and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=total_steps, initial=start_step, bar_format=layout, dynamic_ncols=True, file=sys.stderr
            )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, with their values (loss, accuracy)."""
        now = time.monotonic()
        if self._start is None:
            self._start = (step, now)
        done, seconds = step - self._start[0], now - self._start[1]
        if done:
            self.images_per_second = done * self._batch_size / (seconds - self._paused)
            self._seconds_left = seconds / done * (self._total - step)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._describe(values)), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._active and (now >= self._next_line or step >= self._total):
            self._next_line = now + _SECONDS_BETWEEN_LINES
            self._print(step, self._describe(values))

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Prints a line that stays, whatever the clock says: the result of an evaluation."""
        if self._active:
            self._print(step, _format(values))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation and saving: time that is not training."""
        before = time.monotonic()
        yield
        if self._start is not None:
            self._paused += time.monotonic() - before

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _describe(self, values: Mapping[str, float]) -> list[str]:
        parts = _format(values)
        if self.images_per_second is not None:
            parts.append(f"{self.images_per_second:,.0f} images/s")
        if self._seconds_left is not None:
            parts.append(f"{tqdm.format_interval(self._seconds_left)} left")
        return parts

    def _print(self, step: int, parts: Sequence[str]) -> None:
        where = f"{step:,}/{self._total:,}"
        if self._steps_per_epoch is not None:
            where = f"step {where}, epoch {step / self._steps_per_epoch:.2f}"
        tqdm.write(": ".join((where, ", ".join(parts))), file=sys.stderr)


def _format(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]


def environment(devices: Sequence[str]) -> dict:
    """What a result depends on beside the config: versions, machine, devices, commit of the checkout.

    Args:
      devices: descriptions of the devices in use, as the caller has them.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _find_cpu(),
        "cpu_count": os.cpu_count(),
        "devices": list(devices),
        "packages": {name: _find_version(name) for name in _PACKAGES},
        "commit": _find_commit(),
    }


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _find_cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where platform.processor() is empty or the bare architecture
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _find_commit() -> str | None:
    """The commit of the checkout this file is in, "+changes" where files differ; None outside a checkout."""
    git = shutil.which("git")
    here = Path(__file__).resolve()
    if git is None:
        return None

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)

    # An installed copy can lie in a repository that is not this project's: there the file is not tracked.
    if run("ls-files", "--error-unmatch", here.name).returncode:
        return None
    commit = run("rev-parse", "HEAD").stdout.strip()
    return commit + ("+changes" if run("status", "--porcelain", "--untracked-files=no").stdout else "")
