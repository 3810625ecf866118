"""The sides of a benchmark as processes that take turns: while one runs its steps the others wait for their line."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mobilenet_jax.cli.allocator import tuned_environment

_ROOT = Path(__file__).resolve().parents[2]
_WORKERS = Path(__file__).resolve().parent / "workers"
_OWN_SIDES = ("ours", "flax")
_NETWORK = {"ours": "jax_worker.py", "flax": "jax_worker.py", "keras": "keras_worker.py", "torch": "torch_worker.py"}
# For each kind of case the sides there are, and the file that each runs.
SIDES: dict[str, dict[str, str]] = {
    "train": _NETWORK,
    "infer": {**_NETWORK, "litert": "litert_worker.py"},
    "memory": {"ours": "jax_worker.py", "flax": "jax_worker.py"},  # nothing else tells what a step will need
    "input": {"ours": "loader_worker.py", "tfdata": "tfdata_worker.py"},
    "augment": {"ours": "loader_worker.py"},
}


class AbsentError(RuntimeError):
    """A side is not installed, or does not have the case."""


class WorkerError(RuntimeError):
    """A side's process ended, or said something else than an answer."""


class Worker:
    """A process that has loaded a case and runs steps of it on demand. A context manager.

    Raises:
      AbsentError, WorkerError: it cannot be had, in one sentence with the side's name.
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
        """Seconds that `steps` steps take."""
        return self._ask(steps, expected=("seconds",))["seconds"]

    def _ask(self, message, *, expected: tuple[str, ...]) -> dict:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so does its output, which is read next
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            raise WorkerError(f"{self._side} ended with exit code {self._process.wait()}: {self._last_words()}")
        try:
            answer = json.loads(line)
            if set(answer) & set(expected):
                return answer
        except (ValueError, TypeError):
            pass  # said below, as any answer that is none
        raise WorkerError(f"{self._side} answered {line.strip()[:80]!r}, where {' or '.join(expected)} was expected")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

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


@contextlib.contextmanager
def pin_to_cores(count: int) -> Iterator[None]:
    """Every process started inside has the same `count` cores, where the system can say so (Linux)."""
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
    """The worker of `side`, a key of SIDES, for a case with its kind under "what" and its cores under "threads".

    Raises AbsentError and WorkerError as `Worker` does.
    """
    environment = {
        "JAX_PLATFORMS": "cpu",  # unless the user says otherwise: the peers compute there
        **os.environ,
        "OMP_NUM_THREADS": str(case["threads"]),
        "KERAS_BACKEND": "jax",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile times are those of a first time
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if side == "ours":  # as main runs it; the peers as their users run them
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
      case: what the workers load: "what" a key of SIDES, "threads" their cores.
      sides: the first of them is what the others are compared with.
      pythons: the interpreter of a side, where it is not this one.
      rounds: turns of each side; 0 loads and compiles alone. A turn begins with half as many steps that are not
        timed, one at least. Each round runs in the reverse order of the one before.
      seconds: about the length of a turn.

    Returns:
      "sides": {side: {"about", "seconds": of a step, one a round}}, "ratios": {side: {"median", "min", "max"}} of its
      seconds over those of the first side in the same round, "absent" and "failed": {side: one sentence}.
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
    return {"sides": done, "ratios": _compare(done, sides[0]), "absent": absent, "failed": failed}


def _take_turns(workers: dict[str, Worker], failed: dict[str, str], *, rounds: int, seconds: float):
    times: dict[str, list[float]] = {side: [] for side in workers}
    steps: dict[str, int] = {}
    for number in range(-2, rounds):  # the first run warms up, those after it say how many steps a turn has
        for side in list(workers)[:: 1 if number % 2 else -1]:
            try:
                if number >= 0:  # what lay idle for the others' turns is slow at first: caches, reclaimed memory
                    workers[side].run(max(1, steps[side] // 2))
                count = steps.get(side, 1)
                taken = workers[side].run(count)
                while number == -1 and taken < seconds / 4:  # a few steps say little: batches may be waiting
                    count *= 2
                    taken = workers[side].run(count)
            except WorkerError as error:
                failed[side] = str(error)
                del workers[side]
                continue
            if number == -1:
                steps[side] = max(1, round(seconds / taken * count))
            elif number >= 0:
                times[side].append(taken / count)
    return times


def _compare(done: dict[str, dict], first: str) -> dict[str, dict[str, float]]:
    ratios = {}
    for side, result in done.items():
        if first in done and side != first and result["seconds"]:
            rounds = [theirs / own for theirs, own in zip(result["seconds"], done[first]["seconds"], strict=True)]
            ratios[side] = {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds)}
    return ratios
