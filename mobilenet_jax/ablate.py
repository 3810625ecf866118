"""Run a study: python -m mobilenet_jax.ablate --config configs/ablations/linear_bottleneck.py --workdir DIR

A study is a config file with `get_config()`, the base, and `sweep()`, what each variant changes of it. Variants are
trained with several seeds, all variants of a seed before the next one; after each run results.csv, table.md and
figure.png in the workdir are written anew. The same command continues a study that was stopped and keeps what is
finished; a second process with it takes other runs.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import load_config, split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag
from mobilenet_jax.cli.startup import configure_memory, show_own_messages
from mobilenet_jax.models.cost import Cost
from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.studies.study import (
    RunKey,
    Study,
    check_record,
    find_runs,
    lock,
    read_record,
    read_study,
    write_record,
)
from mobilenet_jax.training.config import flatten_config

RATE = 15e9  # multiply-adds a second that training does on two cores, the backward pass being twice the forward one


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, overrides): the overrides are the --config.KEY=VALUE arguments, wherever they stand."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides a key of the base, as --config.train.epochs=1, if no variant sets it",
    )
    parser.add_argument("--config", required=True, help="a study of configs/ablations, with a data set as FILE:digits")
    parser.add_argument("--workdir", help="where runs, table and figure go; default: runs/ablations/NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant; default: 3")
    parser.add_argument("--only", metavar="VARIANT", help="run this variant alone")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and stop")
    add_cache_flag(parser)
    arguments, overrides = split_overrides(argv)
    flags = parser.parse_args(arguments)
    if flags.seeds < 1:
        parser.error(f"--seeds is {flags.seeds}; valid: 1 or more")
    return flags, overrides


def load_study(path: str, overrides: list[str]) -> Study:
    """The study of a file; ValueError, in one sentence, for what is wrong in the file or the overrides."""
    study = read_study(path, load_config(path, overrides))
    keys = [override.partition("=")[0].removeprefix("--config.") for override in overrides]
    for variant, changes in study.variants.items():
        if taken := [key for key in keys if key in changes]:
            raise ValueError(f"--config.{taken[0]} cannot be set: variant {variant} of {study.name} sets it")
    return study


class Plan(NamedTuple):
    """What there is to do, and about how long it takes."""

    text: str
    num_classes: int


def make_plan(study: Study, workdir: Path, runs: Sequence[RunKey], *, needs_data: bool) -> Plan:
    """The plan of `runs`, beside those that the workdir has.

    Raises ValueError or OSError where a run was started with another config, and, if the plan `needs_data`, where the
    data set cannot be opened.
    """
    from mobilenet_jax.data.sources import describe

    known = dict.fromkeys((*runs, *find_runs(study, workdir)))
    for key in known:
        check_record(study, key, workdir)
    config, missing = study.config, ""
    try:
        info = describe(config.data)
        num_classes, images = info.num_classes, info.train_count
    except (ValueError, OSError) as error:
        if needs_data or config.model.num_classes is None:
            raise
        num_classes, images, missing = config.model.num_classes, None, str(error)
    costs = {variant: study.compute_cost(variant, num_classes) for variant in study.variants}
    records = {key: read_record(key.folder(workdir)) for key in known}
    done = {key: r["seconds"] for key, r in records.items() if r is not None and r["status"] == "finished"}
    left = [key for key in runs if (record := records[key]) is None or record["status"] == "started"]
    length = f"time: not known without the data ({missing})"
    if images is not None:
        work = {key: _count_work(study, key, costs[key.variant].madds, images) for key in {*left, *done}}
        length = estimate_time(work, left, done)
    head = f"{study.name} on {config.data.source}: {len(runs)} runs, {len(left)} to do"
    table = format_costs(study, {key.variant: costs[key.variant] for key in runs})
    return Plan(f"{head}\n\n{table}\n\n{length}", num_classes)


def format_costs(study: Study, costs: Mapping[str, Cost]) -> str:
    """A line a variant: parameters, multiply-adds, what it changes of the base."""
    lines = [["variant", "parameters", "multiply-adds", "changes"]]
    for variant, cost in costs.items():
        changes = ", ".join(f"{key}={value}" for key, value in study.variants[variant].items()) or "none"
        name = f"{variant} (base)" if variant == study.baseline else variant
        lines.append([name, f"{cost.params:,}", f"{cost.madds:,}", changes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in lines)


def _count_work(study: Study, key: RunKey, madds: int, images: int) -> float:
    """Multiply-adds of a run's training, the backward pass counted as twice the forward one."""
    config = study.make_config(key)
    seen = images * config.train.epochs if config.train.steps is None else config.train.steps * config.data.batch_size
    return 3 * madds * seen


def estimate_time(work: dict[RunKey, float], left: Sequence[RunKey], done: dict[RunKey, float]) -> str:
    """A sentence: how long the runs `left` take, by those that are `done` (seconds), else by their multiply-adds."""
    if not left:
        return "nothing is left to do"
    rate = sum(work[key] for key in done) / sum(done.values()) if sum(done.values()) else RATE
    seconds = 0.0
    for key in left:
        same = [value for other, value in done.items() if other.variant == key.variant]
        seconds += sum(same) / len(same) if same else work[key] / rate
    by = f"by {len(done)} finished runs" if done else f"at {RATE / 1e9:g} G multiply-adds of training a second"
    return f"time: about {_format_seconds(seconds)}, an estimate {by}"


def _format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def run_one(study: Study, key: RunKey, workdir: Path, num_classes: int) -> str | None:
    """Train a run to its end and keep its record; return the signal that stopped it, if one did.

    A run that is not finite is recorded as failed. Raises UsageError for what `train.Run` refuses.
    """
    from mobilenet_jax.training.run import NonFiniteError, Run

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
        prepared = Run(config, folder)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    with prepared:
        try:
            stopped = prepared.train().get("stopped")
            status = {} if stopped else {"status": "finished"}
        except NonFiniteError as error:
            logging.warning("%s failed: %s", folder, error)
            status = {"status": "failed", "error": str(error)}
    write_record(folder, {**record, **status, "seconds": record["seconds"] + time.perf_counter() - start})
    return stopped


def run_all(study: Study, workdir: Path, runs: Sequence[RunKey], num_classes: int) -> str | None:
    """Do what no other process does or has done, pass after pass until there is nothing; return a signal's name."""
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
                print(f"{study.name}: {key.variant}, seed {key.seed}, in {folder}", file=sys.stderr)
                if stopped := run_one(study, key, workdir, num_classes):
                    return stopped
            report(study, workdir)
    return None


def report(study: Study, workdir: Path) -> str | None:
    """Write the files of the study and return its table; one process at a time."""
    from mobilenet_jax.studies.report import write_report

    with lock(workdir / "lock", wait=True):
        return write_report(study, workdir)


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan, do it, print the table; return the exit code."""
    try:
        study = load_study(flags.config, overrides)
        if flags.only is not None:
            check_choice("--only", flags.only, tuple(study.variants))
        workdir = Path(flags.workdir or f"runs/ablations/{study.name}")
        runs = study.list_runs(flags.seeds, [flags.only] if flags.only else list(study.variants))
        plan = make_plan(study, workdir, runs, needs_data=not flags.dry_run)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(plan.text, flush=True)
    if flags.dry_run:
        return 0
    from mobilenet_jax.data.decode import UnreadableImageError

    show_own_messages()
    print(configure_memory(flags.compilation_cache), file=sys.stderr)
    try:
        stopped = run_all(study, workdir, runs, plan.num_classes)
    except (UnreadableImageError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if stopped:
        print(f"{stopped}: saved; the same command continues", file=sys.stderr)
        return 0
    return conclude(study, workdir, runs)


def conclude(study: Study, workdir: Path, runs: Sequence[RunKey]) -> int:
    """Print the table and what is not in it; return 1 if a run failed, else 0."""
    if table := report(study, workdir):
        print(f"\n{table}", end="")
    statuses = {key: record["status"] for key in runs if (record := read_record(key.folder(workdir)))}
    if busy := [key for key in runs if statuses.get(key, "started") == "started"]:
        print(f"{len(busy)} of {len(runs)} runs are in the hands of another process", file=sys.stderr)
    failed = [str(key.folder(workdir)) for key in runs if statuses.get(key) == "failed"]
    if failed:
        print(f"failed, and not run again unless removed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, 1 if a run failed, 2 for a command that cannot be obeyed."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    return get_exit_code(lambda: run(flags, overrides), interrupted="interrupted; the same command continues")


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
