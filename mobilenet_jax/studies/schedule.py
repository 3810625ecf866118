"""The runs of a study in order, shared between processes: a run belongs to the process that holds its lock."""

import contextlib
import fcntl
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mobilenet_jax.cli.exit_codes import UsageError
from mobilenet_jax.studies.records import read_record, write_record
from mobilenet_jax.studies.sharing import find_finished, take_over
from mobilenet_jax.studies.study import RunKey, Study
from mobilenet_jax.training.config import flatten_config


class Outcome(NamedTuple):
    """The state of a study when this process has nothing left to do."""

    table: str | None  # Markdown; None if no run has finished
    busy: list[RunKey]  # the runs that another process holds
    failed: list[RunKey]
    stopped: str | None = None  # the signal that stopped a run; then the other fields are empty


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock the file `path`; yield False if another process holds the lock and `wait` is False.

    The system releases the lock when the process dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run_study(study: Study, workdir: Path, runs: Sequence[RunKey], num_classes: int) -> Outcome:
    """Train the runs that no other process has trained or is training, and write the report.

    Raises UsageError for a run that cannot start, UnreadableImageError or OSError for one that cannot go on.
    """
    if stopped := run_all(study, workdir, runs, num_classes):
        return Outcome(None, [], [], stopped)
    table = report(study, workdir)
    statuses = {key: record["status"] for key in runs if (record := read_record(key.folder(workdir)))}
    busy = [key for key in runs if statuses.get(key, "started") == "started"]
    return Outcome(table, busy, [key for key in runs if statuses.get(key) == "failed"])


def run_all(study: Study, workdir: Path, runs: Sequence[RunKey], num_classes: int) -> str | None:
    """Train each run that is free and not done; return the signal that stopped a run, or None.

    A run that a study beside this one has finished is not trained: its results are copied.
    Passes over all runs repeat until one finds nothing to do, because another process may release a run meanwhile.
    """
    took_one = True
    while took_one:
        took_one = False
        for key in runs:
            folder = key.folder(workdir)
            with lock(folder / "lock", wait=False) as mine:
                record = read_record(folder)
                if not mine or (record is not None and record["status"] != "started"):
                    continue
                took_one = True
                title = f"{study.name}: {key.variant}, seed {key.seed}"
                if record is None and (source := find_finished(study, key, workdir)):
                    print(f"{title}: the results of {source}, which has the same config", file=sys.stderr)
                    take_over(study, key, workdir, source)
                    continue
                print(f"{title}, in {folder}", file=sys.stderr)
                if stopped := run_one(study, key, workdir, num_classes):
                    return stopped
            report(study, workdir)
    return None


def run_one(study: Study, key: RunKey, workdir: Path, num_classes: int) -> str | None:
    """Train one run to its end and keep its record; return the signal that stopped it, or None.

    A loss that is not finite is recorded as a failure. Raises UsageError if the run cannot start.
    """
    from mobilenet_jax.training.run import NonFiniteError, RefusedError, train_and_evaluate

    folder, config = key.folder(workdir), study.make_config(key)
    before = read_record(folder)
    record = {
        "study": study.name,
        "variant": key.variant,
        "seed": key.seed,
        "num_classes": num_classes,
        "status": "started",
        "seconds": before["seconds"] if before else 0.0,
        "config": flatten_config(config),
    }
    write_record(folder, record)
    start, stopped = time.perf_counter(), None
    try:
        stopped = train_and_evaluate(config, folder).get("stopped")
        status = {} if stopped else {"status": "finished"}
    except RefusedError as error:
        raise UsageError(str(error)) from error
    except NonFiniteError as error:
        logging.warning("%s failed: %s", folder, error)
        status = {"status": "failed", "error": str(error)}
    write_record(folder, {**record, **status, "seconds": record["seconds"] + time.perf_counter() - start})
    return stopped


def report(study: Study, workdir: Path) -> str | None:
    """Write the files of the study and return its table, or None; only one process at a time writes."""
    from mobilenet_jax.studies.report import write_report

    with lock(workdir / "lock", wait=True):
        return write_report(study, workdir)
