"""Pictures of a finished run: its learning curves and its confusion matrix, as PNG files."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

MAX_CLASSES = 100  # of a confusion matrix; beyond, a cell is smaller than a few pixels
_MAX_CLASSES_WITH_COUNTS = 20
# prefix of the metrics' names, label, colour (Okabe and Ito's, told apart by colour-blind readers), width,
# order
_SERIES = (
    ("train", "train", "#999999", 1.2, 1),
    ("eval", "evaluation", "#0072B2", 1.8, 2),
    ("eval_ema", "evaluation, EMA", "#D55E00", 1.8, 3),
)


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
