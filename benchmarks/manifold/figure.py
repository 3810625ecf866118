"""The figure of the experiment: the spiral before and after each map, and the losses against n."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.manifold.experiment import draw_embedding, expect, format_share, make_spiral, project_back
from mobilenet_jax.plots import COLORS, save, style_axes

_BLUE, _RED, _GREY, _DARK = COLORS[0], COLORS[1], COLORS[6], "#444444"


def draw(rows: Sequence[dict], path: Path, *, seed: int = 0) -> None:
    """Draw the spiral after one T for each n, and the measured losses against n, as a PNG."""
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
    save(figure, path)


def _draw_errors(axes, rows: Sequence[dict]) -> None:
    series = (("error_pseudo_inverse", "T⁺, as drawn", _BLUE), ("error_linear", "best linear decoder", _RED))
    for i, (key, label, color) in enumerate(series):
        places = np.arange(len(rows)) + (i - 0.5) * 0.36
        low, median, high = (np.array([row[f"{key}_q{q}"] for row in rows]) for q in (25, 50, 75))
        whiskers = [median - low, high - median]
        axes.bar(places, median, 0.34, yerr=whiskers, color=color, label=label, ecolor=_DARK, capsize=3)
    # T^+ ReLU(T x) is x / 2 on average: ReLU(T x) = (T x + |T x|) / 2, and T and -T have the same distribution.
    axes.axhline(0.25, color=_DARK, linewidth=1, linestyle=":", label="1/4: T⁺ returns x / 2")
    axes.set_xticks(range(len(rows)), [f"n = {row['dimensions']}" for row in rows])
    axes.set_ylim(bottom=0)
    style_axes(axes, y_label="squared error over squared norm")
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False)


def _draw_losses(axes, rows: Sequence[dict]) -> None:
    dimensions = np.array([row["dimensions"] for row in rows])
    curve = np.arange(dimensions.min(), dimensions.max() + 1)
    formula = [expect(int(n))["unrecoverable"] for n in curve]
    axes.plot(curve, formula, color=_GREY, linewidth=1, label="points not recoverable: (n + 1) / 2ⁿ")
    for key, label, color, marker in (
        ("unrecoverable", "points not recoverable, measured", _BLUE, "o"),
        ("maps_with_loss", "maps that lose a point", _RED, "s"),
    ):
        seen = [(row["dimensions"], row[key]) for row in rows if row[key] > 0]
        axes.plot(*zip(*seen, strict=True), marker, color=color, label=label, markersize=6)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 2)
    axes.yaxis.set_major_formatter(lambda share, _: format_share(share))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(dimensions)
    style_axes(axes, x_label="n", y_label="share")
    axes.legend(frameon=False)
