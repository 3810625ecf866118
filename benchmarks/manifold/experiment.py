"""The spiral, its embeddings, and measures of the loss, over many random matrices."""

import csv
import io
from collections.abc import Sequence

import numpy as np

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
    """Make points [points, 2] with nearly equal steps on two turns from near the origin to radius 1."""
    share = np.sqrt(np.arange(1, points + 1) / points)
    angle = 2 * np.pi * _TURNS * share
    return share[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def draw_embedding(dimensions: int, seed: int) -> np.ndarray:
    """Draw a matrix T [dimensions, 2] with standard normal entries."""
    return np.random.default_rng((seed, dimensions)).standard_normal((dimensions, 2))


def embed(points: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """Return ReLU(T x) [P, n] of points x [P, 2]."""
    return np.maximum(points @ embedding.T, 0)


def project_back(points: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """Return T^+ ReLU(T x) [P, 2] of points x [P, 2], which Fig. 1 shows."""
    return embed(points, embedding) @ np.linalg.pinv(embedding).T


def measure(points: np.ndarray, embedding: np.ndarray) -> dict[str, float]:
    """Measure what ReLU after the embedding T [n, 2] loses of points [P, 2] that are ordered along a curve.

    Returns:
      {key of MEASURES: value}. Errors are squared distances over squared norms, for T^+ and for the linear decoder that
      fits the points best. `unrecoverable` is the share of points with fewer than 2 active dimensions, and
      `maps_with_loss` is 1 if there is such a point. `collapsed_pairs` is the share of neighbours that are mapped to
      the same point. `rank` is the mean rank of the map at a point. `area` is the mean ratio between the area of a
      small piece after the map and its area without ReLU.
    """
    images = embed(points, embedding)
    active = (images > 0).astype(float)
    count = active.sum(axis=1)
    decoder, *_ = np.linalg.lstsq(images, points, rcond=None)
    # The Gram matrix of the active rows at each point. Its determinant is the squared area of a mapped unit square.
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
    """Return the expected values of those measures for which there is a formula.

    The number of active dimensions is Binomial(n, 1/2), so that P(fewer than 2) = (n + 1) / 2^n. The rank is
    min(number, 2).
    """
    total = 2.0**dimensions
    return {"unrecoverable": (dimensions + 1) / total, "rank": 2 - (dimensions + 2) / total}


def run_study(seeds: int, *, dimensions: Sequence[int] = DIMENSIONS) -> list[dict]:
    """Measure `seeds` random matrices for each number of dimensions.

    Returns:
      a row for each n: {"dimensions", "seeds", MEASURE: mean, MEASURE_sd, MEASURE_q25, MEASURE_q50, MEASURE_q75}. The
      error of T^+ has no stable mean at n = 2 or 3, where T may be nearly singular, so it is reported by quartiles.
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
    """Format a Markdown table: median and quartiles of errors, mean and standard deviation of the other measures."""
    shown = [*MEASURES.values(), "formula: not recoverable", "formula: rank"]
    lines = ["| n | " + " | ".join(shown) + " |", "|---:|" + "---:|" * len(shown)]
    for row in rows:
        cells = [_format(key, row) for key in MEASURES]
        expected = expect(row["dimensions"])
        cells += [format_share(expected["unrecoverable"]), f"{expected['rank']:.3f}"]
        lines.append(f"| {row['dimensions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _format(key: str, row: dict) -> str:
    mean, deviation = row[key], row[f"{key}_sd"]
    if key.startswith("error"):
        return f"{row[f'{key}_q50']:.3f} ({row[f'{key}_q25']:.3f} to {row[f'{key}_q75']:.3f})"
    if key == "maps_with_loss":  # either 0 or 1 for a map, so that the mean determines the deviation
        return format_share(mean)
    return f"{mean:.3f} ± {deviation:.3f}" if key == "rank" else f"{format_share(mean)} ± {format_share(deviation)}"


def format_share(value: float) -> str:
    """Format a share as a percentage with 3 significant digits."""
    return f"{100 * value:.3g}%"


def format_csv(rows: Sequence[dict]) -> str:
    """Format the rows as CSV with 6 significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
