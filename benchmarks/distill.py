"""Compare a student alone with the same student and a teacher.

    python -m benchmarks.distill --config=configs/distill.py --teacher=runs/teacher --workdir=runs/distill --seeds=3

`taught` is the config with the teacher. `mixed` is the same without the teacher: the labels, mixed as the images are,
take its place. `alone` is `mixed` without mixup and cutmix. All ways have the same network, optimizer, augmentation and
epochs. Finished runs are kept and a stopped run continues. WORKDIR gets results.csv and table.md, whose last line is
the accuracy of the teacher on the same images.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.transfer import run, write_results
from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import apply_preprocessing, load_config, split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.training.evaluate import evaluate_weights
from mobilenet_jax.training.run import RefusedError
from mobilenet_jax.weights.load import load_weights

WAYS = ("alone", "mixed", "taught")


def make_config(way: str, *, seed: int, flags: argparse.Namespace, overrides: list[str]) -> Any:
    """Make the config of a run."""
    config: Any = load_config(flags.config, overrides)
    config.seed, config.name = seed, f"{config.name}_{way}"
    config.train.distill.weights = flags.teacher if way == "taught" else ""
    if way == "alone":
        config.data.mixup = config.data.cutmix = 0.0
    return config


def describe_teacher(flags: argparse.Namespace, overrides: list[str]) -> str:
    """Return a sentence with the accuracy of the teacher, on evaluation images that are prepared as its card says.

    Raises UsageError for weights that cannot be read or have other classes.
    """
    config = make_config("taught", seed=0, flags=flags, overrides=overrides)
    try:
        weights = load_weights(flags.teacher, config.train.distill.name or None)
        apply_preprocessing(config, weights[2], [])
        found = evaluate_weights(weights, config.data)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return f"The teacher, {weights[2]['name']}, has {100 * found['top1']:.1f}% of {found['count']:,}.\n"


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return (flags, overrides of the config)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.KEY=VALUE overrides a key of the config of every run",
    )
    add = parser.add_argument
    add("--config", required=True, help="a config file with train.distill, with an argument as FILE:ARGUMENT")
    add("--teacher", required=True, help="weights that load_weights can load")
    add("--workdir", type=Path, required=True, help="folder of the study; a run is WORKDIR/WAY_SEED")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--seeds", type=int, default=3, help="number of seeds: 0 to N-1; default: %(default)s")
    arguments, overrides = split_overrides(argv)
    return parser.parse_args(arguments), overrides


def run_study(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Run what is missing and write the table; return the exit code."""
    flags.workdir.mkdir(parents=True, exist_ok=True)
    teacher, rows = describe_teacher(flags, overrides), []
    # All ways with one seed come before the next seed, so that a stopped study can compare them.
    for seed in range(flags.seeds):
        for way in flags.ways:
            config = make_config(way, seed=seed, flags=flags, overrides=overrides)
            try:
                rows.append(run(way, config, flags.workdir / f"{way}_{seed}"))
            except RefusedError as error:
                raise UsageError(str(error)) from error
            ordered = sorted(rows, key=lambda row: WAYS.index(row["way"]))
            table = f"{write_results(ordered, flags.workdir)}\n{teacher}"
            (flags.workdir / "table.md").write_text(table)
            print(table, flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a command that cannot be run, 130 if a signal stopped it."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    return get_exit_code(lambda: run_study(flags, overrides), interrupted="stopped; the same command continues")


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
