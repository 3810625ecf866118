"""Run a study: python -m mobilenet_jax.ablate --config configs/ablations/linear_bottleneck.py --workdir DIR

A study is a config file with two functions: get_config() returns the base config, sweep() the changes that each variant
makes to it. Each variant is trained with several seeds; all variants are trained with one seed before the next. After
each run, results.csv, table.md and figure.png in the workdir are rewritten. The same command continues a study that was
stopped, and skips finished runs. Several processes can run the same command at once: each takes other runs.
"""

import argparse
import sys

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag
from mobilenet_jax.cli.startup import configure_memory, show_own_messages
from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.studies.plan import make_plan
from mobilenet_jax.studies.schedule import run_study
from mobilenet_jax.studies.study import find_workdir, load_study


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags, and the --config.KEY=VALUE arguments from anywhere in the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides a key of the base config, such as --config.train.epochs=1; keys that a "
        "variant sets cannot be overridden",
    )
    parser.add_argument(
        "--config",
        required=True,
        help="a study such as linear_bottleneck, or a config file; STUDY:DATASET chooses the data set",
    )
    parser.add_argument("--workdir", help="folder for runs, table and figure; default: runs/ablations/NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each variant; default: 3")
    parser.add_argument("--only", metavar="VARIANT", help="run only this variant")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and exit")
    add_cache_flag(parser)
    arguments, overrides = split_overrides(argv)
    flags = parser.parse_args(arguments)
    if flags.seeds < 1:
        parser.error(f"--seeds is {flags.seeds}; valid: 1 or more")
    return flags, overrides


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan, carry it out and print the table; return the exit code."""
    try:
        study = load_study(flags.config, overrides)
        if flags.only is not None:
            check_choice("--only", flags.only, tuple(study.variants))
        workdir = find_workdir(study, flags.workdir)
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
        outcome = run_study(study, workdir, runs, plan.num_classes)
    except (UnreadableImageError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if outcome.stopped:
        print(f"{outcome.stopped}: saved; the same command continues", file=sys.stderr)
        return 0
    if outcome.table:
        print(f"\n{outcome.table}", end="")
    if outcome.busy:
        print(f"another process holds {len(outcome.busy)} of {len(runs)} runs", file=sys.stderr)
    if outcome.failed:
        folders = ", ".join(str(key.folder(workdir)) for key in outcome.failed)
        print(f"failed: {folders}; remove a folder to run it again", file=sys.stderr)
    return 1 if outcome.failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a run failed, 2 for a mistake in the command line."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    return get_exit_code(lambda: run(flags, overrides), interrupted="interrupted; the same command continues")


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
