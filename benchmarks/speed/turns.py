"""The sides of a benchmark as processes that take turns: while one runs its steps, the others wait for a line."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mobilenet_jax.cli.allocator import tuned_environment

_ROOT = Path(__file__).resolve().parents[2]
_WORKERS = Path(__file__).resolve().parent / "workers"
_OWN_SIDES = ("ours", "ours_fast", "ours_resized", "flax", "litert", "onnx")
_LOADER = dict.fromkeys(("ours", "ours_fast", "ours_resized"), "loader_worker.py")
_NETWORK = {
    "ours": "jax_worker.py",
    "flax": "jax_worker.py",
    "keras": "keras_worker.py",
    "torch": "torch_worker.py",
    "torch_compile": "torch_worker.py",
}
# For each kind of case, its sides and the file that each side runs.
SIDES: dict[str, dict[str, str]] = {
    "train": _NETWORK,
    "infer": {**_NETWORK, "litert": "runtime_worker.py", "onnx": "runtime_worker.py"},
    "memory": {"ours": "jax_worker.py", "flax": "jax_worker.py", "torch": "torch_worker.py"},
    "input": {**_LOADER, "tfdata": "tfdata_worker.py"},
    "augment": {"ours": "loader_worker.py"},
}


class AbsentError(RuntimeError):
    """A side is not installed, or does not support the case."""


class WorkerError(RuntimeError):
    """A side's process ended, or answered with something that is not an answer."""


class Worker:
    """A process that has loaded a case and runs steps of it on demand. A context manager.

    Raises:
      AbsentError: the side is not installed, or does not support the case.
      WorkerError: the process failed. Both messages are one sentence with the side's name.
    """

    def __init__(self, side: str, command: Sequence[str | Path], case: Mapping, *, environment: Mapping[str, str]):
        self._side, self._errors = side, tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=dict(environment),
            text=True,
        )
        try:
            answer = self._ask(dict(case), expected=("about", "absent"))
            if "absent" in answer:
                raise AbsentError(f"{side}: {answer['absent']}")
        except BaseException:
            self.close()
            raise
        self.about: dict = answer["about"]

    def run(self, steps: int) -> float:
        """Run `steps` steps; return their seconds."""
        return self._ask(steps, expected=("seconds",))["seconds"]

    def _ask(self, message, *, expected: tuple[str, ...]) -> dict:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; reading its output notices that
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            raise WorkerError(
                f"{self._side} ended with exit code {self._process.wait()}: {read_last_line(self._errors)}"
            )
        try:
            answer = json.loads(line)
            if set(answer) & set(expected):
                return answer
        except (ValueError, TypeError):
            pass  # not JSON, or not an object: not an answer either
        raise WorkerError(f"{self._side} answered {line.strip()[:80]!r}, where {' or '.join(expected)} was expected")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_last_line(file: IO[bytes]) -> str:
    """Return the last line of a process's messages that is not blank."""
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@contextlib.contextmanager
def pin_to_cores(count: int) -> Iterator[None]:
    """Give every process that is started inside the same `count` cores, on systems that can do so (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if count > len(allowed):
        raise ValueError(f"--threads is {count}; this process may use {len(allowed)} cores")
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def start_worker(side: str, case: Mapping, *, python: str) -> Worker:
    """Start the worker of a side.

    Args:
      side: a side of SIDES[case["what"]].
      case: what the worker loads; "threads" is its number of cores.
      python: the interpreter.

    Raises:
      AbsentError, WorkerError: as `Worker` raises them.
    """
    environment = {
        "JAX_PLATFORMS": "cpu",  # unless the user says otherwise: the peers run on the CPU
        **os.environ,
        "OMP_NUM_THREADS": str(case["threads"]),
        "KERAS_BACKEND": "jax",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # so that compile times are those of a first run
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if side in _LOADER:  # as main sets it; the peers run as their users run them
        environment |= tuned_environment()
    if side in _OWN_SIDES:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    command = [python, _WORKERS / SIDES[case["what"]][side]]
    return Worker(side, command, {**case, "side": side}, environment=environment)


def measure(
    case: Mapping, sides: Sequence[str], *, pythons: Mapping[str, str], rounds: int, seconds: float
) -> dict[str, dict]:
    """Run a case on every side, in turns.

    Args:
      case: what the workers load: "what" is a key of SIDES, "threads" the number of cores.
      sides: the others are compared with the first.
      pythons: the interpreters of sides that do not run in this one.
      rounds: timed turns of each side; with 0, workers only load and compile. Before each turn a side runs half as
        many steps, at least one, that are not timed. Each round runs in the reverse order of the round before.
      seconds: the approximate length of a turn.

    Returns:
      {"sides": {side: {"about", "seconds": [of a step, in each round]}},
      "ratios": {side: {"median", "min", "max"}}: its seconds over the first side's seconds in the same round,
      "absent": {side: one sentence}, "failed": {side: one sentence}}.
    """
    absent, failed, times = {}, {}, {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for side in sides:
            try:
                worker = start_worker(side, case, python=pythons.get(side, sys.executable))
                workers[side] = stack.enter_context(worker)
            except AbsentError as error:
                absent[side] = str(error)
            except WorkerError as error:
                failed[side] = str(error)
        abouts = {side: worker.about for side, worker in workers.items()}
        if rounds:
            times = _take_turns(workers, failed, rounds=rounds, seconds=seconds)
    done = {side: {"about": about, "seconds": times.get(side, [])} for side, about in abouts.items()}
    done = {side: result for side, result in done.items() if side not in failed}
    return {"sides": done, "ratios": compare(done, sides[0]), "absent": absent, "failed": failed}


def _take_turns(
    workers: dict[str, Worker], failed: dict[str, str], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return {side: seconds of a step in each round}; move sides whose process ends from `workers` to `failed`."""

    def run_each(turn: Callable[[str], Any], *, backwards: bool) -> dict[str, Any]:
        results = {}
        for side in list(workers)[:: -1 if backwards else 1]:
            try:
                results[side] = turn(side)
            except WorkerError as error:
                failed[side] = str(error)
                del workers[side]
        return results

    run_each(lambda side: workers[side].run(1), backwards=True)  # warms up
    steps = run_each(lambda side: _count_steps(workers[side], seconds), backwards=False)
    times: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(rounds):
        found = run_each(lambda side: _time_step(workers[side], steps[side]), backwards=number % 2 == 0)
        for side, time in found.items():
            times[side].append(time)
    return times


def _count_steps(worker: Worker, seconds: float) -> int:
    """Return how many steps of a worker take about `seconds`."""
    count = 1
    while (taken := worker.run(count)) < seconds / 4:  # a few steps are not enough: prefetched batches may be waiting
        count *= 2
    return max(1, round(seconds / taken * count))


def _time_step(worker: Worker, count: int) -> float:
    """Return the mean seconds of `count` steps, after half as many that are not timed."""
    worker.run(max(1, count // 2))  # caches and memory have gone to the other sides meanwhile
    return worker.run(count) / count


def compare(done: Mapping[str, dict], first: str) -> dict[str, dict[str, float]]:
    """Return {side: {"median", "min", "max"}}: its seconds over those of the side `first` in the same round."""
    ratios = {}
    for side, result in done.items():
        if first in done and side != first and result["seconds"]:
            rounds = [theirs / own for theirs, own in zip(result["seconds"], done[first]["seconds"], strict=True)]
            ratios[side] = {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds)}
    return ratios
