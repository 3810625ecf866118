"""The style of all figures, the pictures of a finished run, and the pictures of a study; all are PNG files."""

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Grey and black come last.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
GRID = "#e6e6e6"
MAX_CLASSES = 100  # of a confusion matrix; with more, a cell would be smaller than a few pixels
_DPI = 120
_MAX_CLASSES_WITH_COUNTS = 20
# prefix of the metrics' names, label, colour, line width, drawing order
_SERIES = (
    ("train", "train", COLORS[6], 1.2, 1),
    ("eval", "evaluation", COLORS[0], 1.8, 2),
    ("eval_ema", "evaluation, EMA", COLORS[1], 1.8, 3),
)
# The ninth variant has the first colour again, on a dashed line.
_STYLES = [(color, line) for line in ("-", "--", ":") for color in COLORS]
_MAX_NAMED = 8  # variants in a frontier; more names would cover each other
Estimate = tuple[Sequence[float], float, float]  # single values, mean, half the width of the interval


def make_figure(width: float, height: float, **subplots_arguments: Any) -> tuple[Figure, Any]:
    """Make a figure without pyplot; return it with the axes of `Figure.subplots(**subplots_arguments)`.

    Args:
      width: inches; an inch is 120 pixels.
      height: inches.
      **subplots_arguments: for example `nrows=1, ncols=2`; by default there is one panel.
    """
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(**subplots_arguments)


def style_axes(
    axes: Axes, *, x_label: str = "", y_label: str = "", title: str = "", percent: str | None = None
) -> None:
    """Give a panel the house style: a light grid behind the data, and no spine at the top or on the right.

    Args:
      axes: the panel.
      x_label: the label of the horizontal axis; empty leaves the label as it is.
      y_label: the label of the vertical axis; empty leaves the label as it is.
      title: the text above the panel; empty leaves the title as it is.
      percent: "x" or "y": the axis whose values are shares, which are written as percentages.

    Raises:
      ValueError: `percent` is another value.
    """
    if percent not in (None, "x", "y"):
        raise ValueError(f"percent is {percent!r}; valid: x, y, None")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(**{key: text for key, text in (("xlabel", x_label), ("ylabel", y_label), ("title", title)) if text})
    if percent:
        axis = axes.xaxis if percent == "x" else axes.yaxis
        axis.set_major_formatter(PercentFormatter(xmax=1))


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure as a PNG, whatever the suffix of the path is. The path may lie in a bucket."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    epath.Path(path).write_bytes(image.getvalue())


def draw_curves(metrics: Sequence[dict], path: str | os.PathLike, *, title: str) -> None:
    """Draw loss and top-1 accuracy against epochs, with the final values in the legends (1200 x 480 pixels).

    Args:
      metrics: lines of `read_metrics`. The keys used are "epoch", and "loss" and "top1" (a share) with the prefixes
        "train/", "eval/" and "eval_ema/". Missing and null values are skipped.
      path: the PNG to write.
      title: the text above both panels.

    Raises:
      ValueError: there is nothing to draw.
    """
    figure, (loss_axes, accuracy_axes) = make_figure(10, 4, ncols=2)
    drawn = _draw_panel(loss_axes, metrics, "loss", "{:.4f}")
    drawn += _draw_panel(accuracy_axes, metrics, "top1", "{:.2%}")
    if not drawn:
        raise ValueError(f"{path}: no curves, because the metrics hold neither loss nor top1 of any epoch")
    style_axes(loss_axes, x_label="epoch", y_label="loss")
    loss_axes.set_ylim(bottom=0)
    style_axes(accuracy_axes, x_label="epoch", y_label="top-1 accuracy", percent="y")
    figure.suptitle(title)
    save(figure, path)


def _draw_panel(axes: Axes, metrics: Sequence[dict], name: str, template: str) -> int:
    """Draw one quantity of every series that has it; return the number of series drawn."""
    drawn = 0
    for prefix, label, color, width, order in _SERIES:
        key = f"{prefix}/{name}"
        lines = [line for line in metrics if line.get(key) is not None and line.get("epoch") is not None]
        if not lines:
            continue
        epochs, values = [line["epoch"] for line in lines], [line[key] for line in lines]
        label = f"{label}: {template.format(values[-1])}"
        axes.plot(epochs, values, color=color, linewidth=width, zorder=order, label=label)
        axes.plot(epochs[-1], values[-1], "o", color=color, markersize=4, zorder=order)
        drawn += 1
    if drawn:
        axes.legend(frameon=False)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draw a confusion matrix: colours are shares of the true class; up to 20 classes the counts are printed too.

    Args:
      matrix: counts [K, K], with K at most 100; a row is a true class, a column a predicted class.
      class_names: K names.
      path: the PNG to write.

    Raises:
      ValueError: the matrix does not fit the names, is empty, or has more than 100 classes.
    """
    matrix = np.asarray(matrix)
    classes = len(class_names)
    if matrix.shape != (classes, classes) or not matrix.sum():
        raise ValueError(f"a confusion matrix of shape {matrix.shape}, sum {matrix.sum()}, for {classes} classes")
    if classes > MAX_CLASSES:
        raise ValueError(f"{classes} classes are too many for a confusion matrix; valid are up to {MAX_CLASSES}")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # the row of a class without examples stays blank
    side = min(5 + 0.22 * classes, 16)
    figure, axes = make_figure(side + 1, side)
    # On a square-root scale, single errors are visible beside a full diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    font_size = 9 if classes <= 30 else 6
    axes.set_xticks(range(classes), class_names, rotation=90, fontsize=font_size)
    axes.set_yticks(range(classes), class_names, fontsize=font_size)
    if max(map(len, class_names)) <= 2:
        axes.tick_params(axis="x", labelrotation=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    correct, total = int(np.trace(matrix)), int(matrix.sum())
    axes.set_title(f"accuracy {correct / total:.2%} ({correct:,} of {total:,})")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    if classes <= _MAX_CLASSES_WITH_COUNTS:
        for row, column in np.argwhere(matrix):
            color = "white" if shares[row, column] > 0.35 else "black"
            count = f"{matrix[row, column]:,}"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    save(figure, path)


def draw_variants(
    estimates: Mapping[str, Estimate],
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    base: str,
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draw the top-1 of each variant, with 95% intervals and single runs, and beside it the learning curves.

    Args:
      estimates: for each variant: the top-1 of each run in %, the mean, and half the width of the interval (nan if
        there is one run).
      curves: for each variant: one curve per run, a list of (epoch, top-1 as a share). Single runs and their mean are
        drawn.
      base: the variant whose mean is drawn as a vertical line.
      path: the PNG to write.
      title: the text above both panels.
    """
    figure, (axes, curve_axes) = make_figure(11, max(3.5, 1.6 + 0.42 * len(estimates)), ncols=2)
    styles = dict(zip(estimates, itertools.cycle(_STYLES), strict=False))
    _draw_estimates(axes, estimates, base, styles)
    for variant, runs in curves.items():
        color, line = styles[variant]
        epochs = [epoch for epoch, _ in min(runs, key=len)]
        points = 100 * np.array([[top1 for _, top1 in run[: len(epochs)]] for run in runs])
        curve_axes.plot(epochs, points.T, line, color=color, alpha=0.35, linewidth=0.8)
        curve_axes.plot(epochs, points.mean(0), line, color=color, marker="o", markersize=3, label=variant)
    curve_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve_axes.legend(frameon=False, fontsize=8)
    style_axes(axes, x_label="top-1, %: mean with 95% interval; dots: single runs")
    style_axes(curve_axes, x_label="epoch; thin: single runs", y_label="top-1, %")
    figure.suptitle(title)
    save(figure, path)


def _draw_estimates(
    axes: Axes, estimates: Mapping[str, Estimate], base: str, styles: Mapping[str, tuple[str, str]]
) -> None:
    """Draw one row for each variant, the first at the top."""
    for row, (variant, (values, mean, half)) in enumerate(estimates.items()):
        color = styles[variant][0]
        axes.plot(values, [row + 0.18] * len(values), "o", color=color, markersize=3.5, alpha=0.6)
        axes.errorbar(mean, row, xerr=None if math.isnan(half) else half, fmt="D", color=color, capsize=4, markersize=6)
        axes.annotate(f"{mean:.2f}", (mean, row), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    if base in estimates:
        axes.axvline(estimates[base][1], color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(estimates)), [f"{name} (base)" if name == base else name for name in estimates])
    axes.set_ylim(len(estimates) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, 0), min(high, 100))  # the interval of two runs can reach below 0% or above 100%


def draw_frontier(
    estimates: Mapping[str, Estimate],
    madds: Mapping[str, int],
    lines: Mapping[str, Sequence[str]],
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draw top-1 with 95% intervals against multiply-adds, on a logarithmic axis.

    Args:
      estimates: the estimates of each variant, in the form that `draw_variants` takes.
      madds: the multiply-adds of one image, for each variant.
      lines: for each label, the variants that a line joins. Variants without an estimate are skipped. Variants are
        named in the figure if there are at most eight.
      path: the PNG to write.
      title: the text above the panel.
    """
    figure, axes = make_figure(8, 5)
    for (label, variants), (color, style) in zip(lines.items(), itertools.cycle(_STYLES), strict=False):
        known = sorted((variant for variant in variants if variant in estimates), key=lambda variant: madds[variant])
        if not known:
            continue
        costs, means = [madds[variant] for variant in known], [estimates[variant][1] for variant in known]
        halves = np.nan_to_num([estimates[variant][2] for variant in known])
        axes.errorbar(costs, means, yerr=halves, fmt=f"o{style}", color=color, capsize=4, label=label or None)
        for variant in known:
            values = estimates[variant][0]
            axes.plot([madds[variant]] * len(values), values, ".", color=color, markersize=4, alpha=0.6)
            if len(estimates) <= _MAX_NAMED:
                place = (madds[variant], estimates[variant][1])
                axes.annotate(variant, place, (6, -12), textcoords="offset points", fontsize=8, color=color)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15)  # leaves room for the names
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    style_axes(axes, x_label="multiply-adds an image", y_label="top-1, %: mean with 95% interval; dots: single runs")
    figure.suptitle(title)
    save(figure, path)
