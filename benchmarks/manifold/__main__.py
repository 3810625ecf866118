"""Measure what ReLU keeps of a plane: python -m benchmarks.manifold --out=DIR [--seeds=1000]

This is the experiment behind linear bottlenecks (1801.04381, Fig. 1). A random matrix T embeds a spiral into n
dimensions, ReLU is applied, and the pseudo-inverse of T maps the result back. The figure shows this for one T for each
n; the table has the losses over many matrices.

At a point x the map is linear, with the rows t of T for which t x > 0. For normal rows, each is active with probability
1/2 at any x, so that the number of active rows is binomial. With fewer than 2 of them, the plane has collapsed there to
a line or to the origin, and no decoder can recover the point (the paper's Lemma 2 in its Appendix A).

DIR gets results.csv, table.md and figure.png.
"""

import argparse
import os
import sys
from pathlib import Path

from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code


def run(out: Path, seeds: int) -> int:
    """Run the experiment, write its files into the folder `out`, and print the table; return the exit code."""
    # Threads slow small matrices down, and NumPy reads their number when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from benchmarks.manifold.experiment import format_csv, format_table, run_study
    from benchmarks.manifold.figure import draw
    from mobilenet_jax.workdir.files import write_atomic

    if seeds < 2:
        raise UsageError(f"seeds is {seeds}; valid: 2 or more")
    rows = run_study(seeds)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "results.csv", format_csv(rows))
        write_atomic(out / "table.md", format_table(rows))
        draw(rows, out / "figure.png")
    except OSError as error:
        raise UsageError(str(error)) from error
    print(format_table(rows), end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a command that cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.manifold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.csv, table.md and figure.png")
    parser.add_argument("--seeds", type=int, default=1000, help="random matrices for each n; default: %(default)s")
    flags = parser.parse_args(argv)
    return get_exit_code(lambda: run(flags.out, flags.seeds))


if __name__ == "__main__":
    sys.exit(main())
