"""Pictures of a finished run (learning curves, confusion matrix) and of a study's runs, as PNG files."""

import itertools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

MAX_CLASSES = 100  # of a confusion matrix; beyond, a cell is smaller than a few pixels
_MAX_CLASSES_WITH_COUNTS = 20
# prefix of the metrics' names, label, colour (Okabe and Ito's, told apart by colour-blind readers), width,
# order
_SERIES = (
    ("train", "train", "#999999", 1.2, 1),
    ("eval", "evaluation", "#0072B2", 1.8, 2),
    ("eval_ema", "evaluation, EMA", "#D55E00", 1.8, 3),
)
# Of variants: the rest of Okabe and Ito's colours, black last; after eight they come again, dashed.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
_STYLES = [(color, line) for line in ("-", "--", ":") for color in _COLORS]
_MAX_NAMED = 8  # variants in a frontier; more names would cover each other
Estimate = tuple[Sequence[float], float, float]  # single values, mean, half the width of its interval


def draw_curves(metrics: Sequence[dict], path: str | os.PathLike, *, title: str) -> None:
    """Draws loss and top-1 accuracy against epochs, final values in the legends: a PNG of 1200 x 480 pixels.

    Args:
      metrics: lines of `read_metrics`; used are "epoch" and "loss" and "top1" (a share) under "train/",
        "eval/" and "eval_ema/". What is missing or null is left out.
      path: of the PNG.
      title: above both panels.

    Raises:
      ValueError: there is nothing to draw.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    drawn = _draw_panel(loss_axes, metrics, "loss", "{:.4f}")
    drawn += _draw_panel(accuracy_axes, metrics, "top1", "{:.2%}")
    if not drawn:
        raise ValueError(f"{path}: no curves, since the metrics hold no loss and no top1 of any epoch")
    loss_axes.set_ylabel("loss")
    loss_axes.set_ylim(bottom=0)
    accuracy_axes.set_ylabel("top-1 accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _draw_panel(axes: Axes, metrics: Sequence[dict], name: str, template: str) -> int:
    """Draws one quantity of every series that has it; returns how many have."""
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
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return drawn


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draws a confusion matrix as a PNG: a row's colours are shares of its class, counts are printed up to 20
    classes.

    Args:
      matrix: [K, K] counts, K up to 100: row, true class; column, predicted class.
      class_names: K names.
      path: of the PNG.

    Raises:
      ValueError: the matrix does not fit the names, is empty, or has more than 100 classes.
    """
    matrix = np.asarray(matrix)
    classes = len(class_names)
    if matrix.shape != (classes, classes) or not matrix.sum():
        raise ValueError(f"a confusion matrix of shape {matrix.shape}, sum {matrix.sum()}, for {classes} classes")
    if classes > MAX_CLASSES:
        raise ValueError(f"{classes} classes are too many for a confusion matrix; valid are up to {MAX_CLASSES}")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # a class without examples stays blank
    side = min(5 + 0.22 * classes, 16)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    # The root makes single errors visible beside a full diagonal.
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
    figure.savefig(path, format="png")


def draw_variants(
    estimates: Mapping[str, Estimate],
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    base: str,
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draws each variant's top-1 with its 95% interval and single runs, and beside it the learning curves: a PNG.

    Args:
      estimates: {variant: (top-1 of each run in %, mean, half the width of the interval, nan where there is none)}.
      curves: {variant: a list for each run of (epoch, top-1 as a share)}; drawn are single runs and their mean.
      base: the variant whose mean is drawn as a line through all.
      path: of the PNG.
      title: above both panels.
    """
    figure = Figure(figsize=(11, max(3.5, 1.6 + 0.42 * len(estimates))), dpi=120, layout="constrained")
    axes, curve_axes = figure.subplots(1, 2)
    styles = dict(zip(estimates, itertools.cycle(_STYLES), strict=False))
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
    axes.set_xlim(max(low, 0), min(high, 100))  # intervals of two runs reach beyond what an accuracy can be
    axes.set_xlabel("top-1, %: mean with 95% interval; dots: single runs")
    for variant, runs in curves.items():
        color, line = styles[variant]
        epochs = [epoch for epoch, _ in min(runs, key=len)]
        points = 100 * np.array([[top1 for _, top1 in run[: len(epochs)]] for run in runs])
        curve_axes.plot(epochs, points.T, line, color=color, alpha=0.35, linewidth=0.8)
        curve_axes.plot(epochs, points.mean(0), line, color=color, marker="o", markersize=3, label=variant)
    curve_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve_axes.set_xlabel("epoch; thin: single runs")
    curve_axes.set_ylabel("top-1, %")
    curve_axes.legend(frameon=False, fontsize=8)
    _finish_study(figure, path, title)


def draw_frontier(
    estimates: Mapping[str, Estimate],
    madds: Mapping[str, int],
    lines: Mapping[str, Sequence[str]],
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draws top-1 with its 95% interval against multiply-adds, on a logarithmic axis: a PNG.

    Args:
      estimates: as `draw_variants` has them.
      madds: {variant: multiply-adds of an image}.
      lines: {label: variants that a line joins}; those without an estimate are left out. Up to eight variants in all
        are named.
      path: of the PNG.
      title: above the panel.
    """
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
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
    axes.margins(x=0.15)  # room for the names
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    axes.set_xlabel("multiply-adds an image")
    axes.set_ylabel("top-1, %: mean with 95% interval; dots: single runs")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    _finish_study(figure, path, title)


def _finish_study(figure: Figure, path: str | os.PathLike, title: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(title)
    figure.savefig(path, format="png")
