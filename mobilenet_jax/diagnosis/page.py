"""One page of a diagnosis: the first depthwise filters, and the report's numbers layer by layer, as a PNG."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, PercentFormatter

from mobilenet_jax.models.folded import Layer
from mobilenet_jax.training.dead_filters import relative_norms

_LAYERS, _COLUMNS = 4, 16  # depthwise layers whose filters are drawn; filters a row of them
_MAX_FILTERS = 144  # of a layer
_FLOOR = 1e-5  # of the norms that are drawn
# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _RED, _GREY, _GREEN = "#0072B2", "#D55E00", "#BBBBBB", "#009E73"


def draw_page(report: dict, layers: Sequence[Layer], path: str | os.PathLike) -> None:
    """Draws a report of `make_report` and the filters of its `layers`: a PNG of 1920 x 1488 pixels."""
    figure = Figure(figsize=(16, 12.4), dpi=120, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 3.9))
    head, body = parts
    _write_findings(head, report)
    left, right = body.subfigures(1, 2, width_ratios=(1, 1.7))
    _draw_filters(left, report, [layer for layer in layers if layer.kind == "depthwise"][:_LAYERS])
    panels = [draw for draw, shown in _PANELS if shown(report)]
    for axes, draw in zip(np.atleast_1d(right.subplots(len(panels), 1)), panels, strict=True):
        draw(axes, report, layers)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.savefig(path, format="png")


def _write_findings(figure: SubFigure, report: dict) -> None:
    weights, images = report["weights"], report["images"]
    seen = f"{images['count']:,} images of {images['source']}" if images else "weights alone"
    figure.suptitle(f"{weights['name']} ({weights['source']['file']}): {seen}", fontsize=14, x=0.01, ha="left")
    text = "\n".join(textwrap.fill(f"• {s}", 200, subsequent_indent="   ") for s in report["findings"])
    figure.text(0.01, 0.85, text, va="top", fontsize=10, linespacing=1.3)


def _draw_filters(figure: SubFigure, report: dict, layers: Sequence[Layer]) -> None:
    """The filters of each layer as a grid, each by its own largest weight; dead ones in a red frame."""
    entries = {entry["path"]: entry for entry in report["layers"]}
    heights = [-(-min(layer.op.filters, _MAX_FILTERS) // _COLUMNS) for layer in layers]
    panels = np.atleast_1d(figure.subplots(len(layers), 1, height_ratios=[height + 0.8 for height in heights]))
    for axes, layer in zip(panels, layers, strict=True):
        dead = {found["channel"] for found in entries[layer.path]["dead_filters"]}
        count = min(layer.op.filters, _MAX_FILTERS)
        grid = tile_filters(layer.kernel[:, :, 0, :count], columns=_COLUMNS)
        axes.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        side = len(layer.kernel) + 1
        for channel in (channel for channel in dead if channel < count):
            y, x = divmod(channel, _COLUMNS)
            frame = (x * side - 0.5, y * side - 0.5)
            axes.add_patch(Rectangle(frame, side, side, fill=False, edgecolor="#D00000", linewidth=2))
        part = f"first {count} of {layer.op.filters}" if count < layer.op.filters else f"{count}"
        axes.set_title(f"{layer.path}: {part} filters, {len(dead)} dead", fontsize=10, loc="left")
        axes.set_axis_off()
    figure.suptitle("First depthwise filters: red above 0, blue below", fontsize=11, x=0.02, ha="left")


def tile_filters(filters: np.ndarray, *, columns: int) -> np.ndarray:
    """[k, k, C] to one picture of `columns` filters a row, each over its largest magnitude; NaN between and behind."""
    side, count = filters.shape[0] + 1, filters.shape[-1]
    rows = -(-count // columns)
    grid = np.full((rows * side + 1, columns * side + 1), np.nan)
    largest = np.abs(filters).max(axis=(0, 1))
    for channel in range(count):
        y, x = (1 + index * side for index in divmod(channel, columns))
        grid[y : y + side - 1, x : x + side - 1] = filters[..., channel] / (largest[channel] or 1)
    return grid


def _label(axes: Axes, names: Sequence[str], title: str) -> None:
    short = [name.removeprefix("block_").replace("/depthwise", " dw").replace("/project", " pr") for name in names]
    short = [name.replace("/expand", " ex").replace("/pointwise", " pw").replace("/conv", "") for name in short]
    axes.set_xticks(range(len(names)), short, rotation=90, fontsize=6.5)
    axes.set_title(title, fontsize=10, loc="left")


def _draw_plateaus(axes: Axes, report: dict, layers: Sequence[Layer]) -> None:
    entries = [entry for entry in report["layers"] if entry["activations"]]
    floor = np.array([entry["activations"]["floor_share"] for entry in entries])
    ceiling = np.array([entry["activations"]["ceiling_share"] or 0 for entry in entries])
    always = [len(entry["activations"]["dead_channels"]) / entry["channels"] for entry in entries]
    axes.bar(range(len(entries)), floor, color=_GREY, label="outputs at 0")
    axes.bar(range(len(entries)), ceiling, bottom=1 - ceiling, color=_RED, label="at 6")
    axes.plot(range(len(entries)), always, "_", color="black", markersize=7, label="channels always 0")
    lost = [(entry["activations"]["active_units"] or {}).get("lost_pixels") for entry in entries]
    shown = [(i, share) for i, share in enumerate(lost) if share is not None]
    axes.plot(*zip(*shown, strict=True), "D", color=_BLUE, markersize=3.5, label="pixels not recoverable")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _label(axes, [entry["path"] for entry in entries], "Activations")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 0.98))


def _draw_norms(axes: Axes, report: dict, layers: Sequence[Layer]) -> None:
    """A dot a depthwise filter; those below the axis stand at its foot."""
    entries = {entry["path"]: entry for entry in report["layers"]}
    layers = [layer for layer in layers if layer.kind == "depthwise"]
    for place, layer in enumerate(layers):
        norms = np.maximum(np.sort(relative_norms(layer.kernel, layer.factor)), _FLOOR)
        places, dead = place + np.linspace(-0.35, 0.35, len(norms)), norms < report["dead_below"]
        axes.plot(places, norms, ".", color=_GREY, markersize=2)
        axes.plot(places[dead], norms[dead], "o", color=_RED, markersize=4)
        small = len(entries[layer.path]["norm"]["below_epsilon"])
        for count, height, color in ((int(dead.sum()), 0.12, _RED), (small, 0.02, "black")):
            where = axes.get_xaxis_transform()
            axes.text(place, height, str(count or ""), color=color, ha="center", fontsize=7, transform=where)
    axes.axhline(report["dead_below"], color=_RED, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(bottom=_FLOOR / 10)
    title = "Depthwise filters' norms over a usual one of the layer"
    _label(axes, [layer.path for layer in layers], f"{title}; at the foot: dead (red), variances below epsilon (black)")


def _draw_ranks(axes: Axes, report: dict, layers: Sequence[Layer]) -> None:
    rows = report["bottlenecks"]
    places = np.arange(len(rows))
    axes.bar(places, [row["channels"] for row in rows], 0.8, color=_GREY, label="channels")
    axes.bar(places, [row["effective_rank"] for row in rows], 0.5, color=_BLUE, label="effective rank")
    ratios = [row["participation_ratio"] for row in rows]
    axes.plot(places, ratios, "_", color="black", markersize=12, label="participation ratio")
    _label(axes, [row["row"] for row in rows], "Dimensions in use behind each block")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))


def _draw_int8(axes: Axes, report: dict, layers: Sequence[Layer]) -> None:
    entries = report["layers"]
    places = np.arange(len(entries))
    for kind, label, color in (("per_channel", "a scale a channel", _GREEN), ("per_tensor", "one scale", _RED)):
        values = [entry["int8"]["channel_sqnr_db"][kind] for entry in entries]
        axes.bar(places, values, 0.8 if kind == "per_channel" else 0.5, color=color, label=label)
    axes.set_ylabel("dB")
    axes.set_ylim(0, 60)
    _label(axes, [entry["path"] for entry in entries], "int8 weights: signal over rounding, mean over channels")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))


def _draw_gradient_norms(axes: Axes, report: dict, layers: Sequence[Layer]) -> None:
    norms = report["grad_norm"]
    axes.plot(norms["steps"], norms["norms"], color=_BLUE, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title("Gradient norm before clipping", fontsize=10, loc="left")


_PANELS = (
    (_draw_plateaus, lambda report: any(layer["activations"] for layer in report["layers"])),
    (_draw_norms, lambda report: True),
    (_draw_ranks, lambda report: report["bottlenecks"]),
    (_draw_int8, lambda report: True),
    (_draw_gradient_norms, lambda report: report["grad_norm"]),
)
