"""What ReLU leaves of a plane: python -m benchmarks.manifold --out=DIR [--seeds=1000]

The experiment behind linear bottlenecks (1801.04381, Fig. 1). A spiral is embedded into n dimensions by a random matrix
T, goes through ReLU, and comes back by the pseudo-inverse of T. The figure shows it for one T a dimension; the table
has what was lost, over many.

At a point x the map is linear, with the rows t of T for which t x > 0. Of normal rows each is active with probability
1/2, whatever x is, so the number of active ones is binomial: with fewer than 2 the plane has collapsed there to a line
or to the origin, and no decoder brings the point back (the paper's Lemma 2 in its Appendix A).

DIR gets results.csv, table.md and figure.png.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mobilenet_jax.workdir.files import write_atomic

DIMENSIONS = (2, 3, 5, 15, 30)  # 1801.04381, Fig. 1
_TURNS = 2
MEASURES = {
    "error_pseudo_inverse": "error, pseudo-inverse",
    "error_linear": "error, best linear decoder",
    "unrecoverable": "points not recoverable",
    "maps_with_loss": "maps that lose a point",
    "collapsed_pairs": "neighbours made one",
    "rank": "local rank, of 2",
    "area": "area kept",
}


def make_spiral(points: int = 500) -> np.ndarray:
    """[points, 2]: two turns from near the origin to radius 1, about equally spaced."""
    share = np.sqrt(np.arange(1, points + 1) / points)
    angle = 2 * np.pi * _TURNS * share
    return share[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def draw_embedding(dimensions: int, seed: int) -> np.ndarray:
    """T [dimensions, 2] of standard normal entries."""
    return np.random.default_rng((seed, dimensions)).standard_normal((dimensions, 2))


def embed(points: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """ReLU(T x) [P, n] of points x [P, 2]."""
    return np.maximum(points @ embedding.T, 0)


def project_back(points: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """T^+ ReLU(T x) [P, 2] of points x [P, 2]: what Fig. 1 shows."""
    return embed(points, embedding) @ np.linalg.pinv(embedding).T


def measure(points: np.ndarray, embedding: np.ndarray) -> dict[str, float]:
    """What ReLU behind the embedding T [n, 2] loses of points [P, 2], in neighbouring order; the keys are MEASURES.

    Errors are squared distances over squared norms, for T^+ and for the matrix that fits the points best.
    `unrecoverable` is the share of points with fewer than 2 active dimensions, `maps_with_loss` 1 if there is one,
    `collapsed_pairs` the share of neighbours with one image, `rank` the mean rank of the map at a point, `area` the
    mean of the area of a small piece's image over that without ReLU.
    """
    images = embed(points, embedding)
    active = (images > 0).astype(float)
    count = active.sum(axis=1)
    decoder, *_ = np.linalg.lstsq(images, points, rcond=None)
    # The Gram matrix of the active rows, at each point: the squared area of a unit square's image is its determinant.
    first, mixed, second = (active @ (embedding[:, i] * embedding[:, j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    squared_area = np.where(count < 2, 0, first * second - mixed**2)
    norm = np.sum(points**2)
    return {
        "error_pseudo_inverse": np.sum((project_back(points, embedding) - points) ** 2) / norm,
        "error_linear": np.sum((images @ decoder - points) ** 2) / norm,
        "unrecoverable": np.mean(count < 2),
        "maps_with_loss": float(count.min() < 2),
        "collapsed_pairs": np.mean(np.all(images[1:] == images[:-1], axis=1)),
        "rank": np.mean(np.minimum(count, 2)),
        "area": np.mean(np.sqrt(np.maximum(squared_area, 0) / np.linalg.det(embedding.T @ embedding))),
    }


def expect(dimensions: int) -> dict[str, float]:
    """What `measure` gives on average, where there is a formula: the count of active dimensions is Binomial(n, 1/2).

    P(fewer than 2) = (n + 1) / 2^n; the rank is min(count, 2).
    """
    total = 2.0**dimensions
    return {"unrecoverable": (dimensions + 1) / total, "rank": 2 - (dimensions + 2) / total}


def run_study(seeds: int, *, dimensions: Sequence[int] = DIMENSIONS) -> list[dict]:
    """A row for each n: {"dimensions", "seeds", MEASURE: mean, MEASURE_sd, MEASURE_q25, _q50, _q75}, over the seeds.

    The error of T^+ is told by quartiles: where n is 2 or 3 T is at times next to singular, and no mean settles.
    """
    points, rows = make_spiral(), []
    for n in dimensions:
        found = [measure(points, draw_embedding(n, seed)) for seed in range(seeds)]
        row: dict = {"dimensions": n, "seeds": seeds}
        for key in MEASURES:
            values = np.array([each[key] for each in found])
            row |= {key: float(values.mean()), f"{key}_sd": float(values.std(ddof=1))}
            row |= {f"{key}_q{q}": float(np.percentile(values, q)) for q in (25, 50, 75)}
        rows.append(row)
    return rows


def format_table(rows: Sequence[dict]) -> str:
    """Markdown: of errors median and quartiles, of all else mean and standard deviation, and the formulas' values."""
    shown = [*MEASURES.values(), "formula: not recoverable", "formula: rank"]
    lines = ["| n | " + " | ".join(shown) + " |", "|---:|" + "---:|" * len(shown)]
    for row in rows:
        cells = [_format(key, row) for key in MEASURES]
        expected = expect(row["dimensions"])
        cells += [_share(expected["unrecoverable"]), f"{expected['rank']:.3f}"]
        lines.append(f"| {row['dimensions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _format(key: str, row: dict) -> str:
    mean, deviation = row[key], row[f"{key}_sd"]
    if key.startswith("error"):
        return f"{row[f'{key}_q50']:.3f} ({row[f'{key}_q25']:.3f} to {row[f'{key}_q75']:.3f})"
    if key == "maps_with_loss":  # 0 or 1 of a map: its deviation says nothing new
        return _share(mean)
    return f"{mean:.3f} ± {deviation:.3f}" if key == "rank" else f"{_share(mean)} ± {_share(deviation)}"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def draw(rows: Sequence[dict], path: Path, *, seed: int = 0) -> None:
    """The spiral and its images under one T a dimension, and the measured losses against n: a PNG."""
    figure = Figure(figsize=(13, 6.4), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    top, bottom = parts
    points = make_spiral()
    panels = top.subplots(1, len(rows) + 1)
    for axes, row in zip(panels, [None, *rows], strict=True):
        shown, title = points, "input"
        if row:
            shown = project_back(points, draw_embedding(row["dimensions"], seed))
            title = f"n = {row['dimensions']}"
        axes.scatter(*shown.T, c=np.arange(len(points)), cmap="viridis", s=5)
        axes.set_title(title)
        axes.set_aspect("equal")
        axes.set_xlim(-1.1, 1.1)
        axes.set_ylim(-1.1, 1.1)
        axes.set_xticks([])
        axes.set_yticks([])
    top.suptitle(f"A spiral, embedded by a random matrix T, through ReLU, and back by T⁺ (seed {seed})", fontsize=11)
    errors, losses = bottom.subplots(1, 2)
    _draw_errors(errors, rows)
    _draw_losses(losses, rows)
    bottom.suptitle(f"What is lost, over {rows[0]['seeds']:,} matrices (left: medians and quartiles)", fontsize=11)
    figure.savefig(path, format="png")


def _draw_errors(axes, rows: Sequence[dict]) -> None:
    series = (("error_pseudo_inverse", "T⁺, as drawn", "#0072B2"), ("error_linear", "best linear decoder", "#D55E00"))
    for i, (key, label, color) in enumerate(series):
        places = np.arange(len(rows)) + (i - 0.5) * 0.36
        low, median, high = (np.array([row[f"{key}_q{q}"] for row in rows]) for q in (25, 50, 75))
        whiskers = [median - low, high - median]
        axes.bar(places, median, 0.34, yerr=whiskers, color=color, label=label, ecolor="#444444", capsize=3)
    # T^+ ReLU(T x) is x / 2 on average, since ReLU(T x) = (T x + |T x|) / 2 and T has the law of -T.
    axes.axhline(0.25, color="#444444", linewidth=1, linestyle=":", label="1/4: T⁺ gives back x / 2")
    axes.set_xticks(range(len(rows)), [f"n = {row['dimensions']}" for row in rows])
    axes.set_ylabel("squared error over squared norm")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(axes, rows: Sequence[dict]) -> None:
    dimensions = np.array([row["dimensions"] for row in rows])
    curve = np.arange(dimensions.min(), dimensions.max() + 1)
    formula = [expect(int(n))["unrecoverable"] for n in curve]
    axes.plot(curve, formula, color="#999999", linewidth=1, label="points not recoverable: (n + 1) / 2ⁿ")
    for key, label, color, marker in (
        ("unrecoverable", "points not recoverable, measured", "#0072B2", "o"),
        ("maps_with_loss", "maps that lose some point", "#D55E00", "s"),
    ):
        seen = [(row["dimensions"], row[key]) for row in rows if row[key] > 0]
        axes.plot(*zip(*seen, strict=True), marker, color=color, label=label, markersize=6)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 2)
    axes.yaxis.set_major_formatter(lambda share, _: _share(share))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(dimensions)
    axes.set_xlabel("n")
    axes.set_ylabel("share")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _to_csv(rows: Sequence[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, or 2 for a command that cannot be obeyed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.manifold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder of results.csv, table.md and figure.png")
    parser.add_argument("--seeds", type=int, default=1000, help="random matrices a dimension; default: %(default)s")
    flags = parser.parse_args(argv)
    if flags.seeds < 2:
        print(f"seeds is {flags.seeds}; valid: 2 or more", file=sys.stderr)
        return 2
    out, rows = Path(flags.out), run_study(flags.seeds)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "results.csv", _to_csv(rows))
        write_atomic(out / "table.md", format_table(rows))
        draw(rows, out / "figure.png")
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    print(format_table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
