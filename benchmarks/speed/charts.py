"""The figures of a benchmark: ratios as bars, cost against resolution as curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import FormatStrFormatter, NullLocator

from mobilenet_jax.plots import COLORS, make_figure, save, style_axes

_COLORS: dict[str, str] = dict(
    zip(("ours", "torch", "flax", "keras", "tfdata", "litert", "onnx", "torch_compile"), COLORS, strict=False)
)
# Our loader with other keys, and our `predict` with an exported file.
_OWN = ("ours_fast", "ours_resized", "ours_tflite", "ours_onnx")
_COLORS |= dict.fromkeys(_OWN, _COLORS["ours"])
_PEERS = ("torch", "torch_compile", "keras", "flax", "litert", "onnx", "tfdata", *_OWN)  # the columns of the table
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_all(results: Sequence[dict], out: Path) -> list[Path]:
    """Draw ratios.png and resolution.png, as far as the results allow, into the folder `out`; return their paths.

    Raises:
      ValueError: the results allow neither.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    if any(result.get("ratios") for result in results):
        draw_ratios(results, out / "ratios.png")
        drawn.append(out / "ratios.png")
    if list_resolutions(results):
        draw_resolutions(results, out / "resolution.png")
        drawn.append(out / "resolution.png")
    if not drawn:
        raise ValueError("there is nothing to draw: no case was measured on two sides, or at two resolutions")
    return drawn


def format_table(results: Sequence[dict]) -> str:
    """Format a Markdown table of the timed cases: our images/s, then each peer's, with the ratio and its range."""
    timed = [
        result for result in results if result["what"] != "startup" and result["sides"].get("ours", {}).get("seconds")
    ]
    peers = [side for side in _PEERS if any(side in result["ratios"] for result in timed)]
    lines = ["| case | ours |" + "".join(f" {peer} |" for peer in peers), "|---|---:|" + "---:|" * len(peers)]
    for result in timed:
        cells = [f"{result['sides']['ours']['images_per_second']:.4g}"]
        for peer in peers:
            ratio, side = result["ratios"].get(peer), result["sides"].get(peer)
            text = "{median:.2f}x ({min:.2f}-{max:.2f})".format(**ratio) if ratio else ""
            cells.append(f"{side['images_per_second']:.4g}: {text}" if side and ratio else "")
        lines.append(f"| {_label(result)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_ratios(results: Sequence[dict], path: Path) -> None:
    """Draw a bar for each case and peer: how many times as fast ours is (median), with the range over the rounds."""
    bars = [
        (_label(result), side, ratio)
        for result in results
        if result["group"] != "scaling"
        for side, ratio in result.get("ratios", {}).items()
    ]
    figure, axes = make_figure(9, 1.2 + 0.3 * len(bars))
    for row, (_, side, ratio) in enumerate(bars):
        median = ratio["median"]
        spread = [[median - ratio["min"]], [ratio["max"] - median]]
        # Bars start at 1, because a logarithmic axis has no 0: to the right ours is faster, to the left slower.
        axes.barh(row, median - 1, left=1, xerr=spread, color=_COLORS[side], ecolor="#444444", capsize=3, height=0.7)
        axes.annotate(
            f"{median:.2f}", (max(1, ratio["max"]), row), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(bars)), [f"{label}: {side}" for label, side, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.axvline(1, color="#444444", linewidth=1)
    axes.margins(x=0.1, y=0.01)
    style_axes(axes, x_label="how many times as fast as the peer; bar: median, line: range over the rounds")
    axes.grid(visible=False, axis="y")
    save(figure, path)


def _label(result: dict) -> str:
    name = result["name"].removeprefix("mobilenet_")
    return f"{result['what']} {name}, {result['resolution']} px, batch {result['batch_size']}"


def list_resolutions(results: Sequence[dict]) -> dict[tuple[str, str], list[tuple[int, float, int]]]:
    """Collect the curves of `scaling` that have at least two points.

    Only the resolution differs among the points of a curve. The other values are those of the model's first case.

    Returns:
      {(model, side): [(resolution, milliseconds per image, multiply-adds), ...]}.
    """
    curves: dict[tuple[str, str], dict[int, tuple[int, float, int]]] = {}
    bases: dict[str, tuple] = {}
    for result in results:
        if result["group"] == "scaling":
            others = tuple(result[key] for key in ("width", "batch_size", "devices"))
            if bases.setdefault(result["name"], others) == others:
                for side, values in result["sides"].items():
                    point = (result["resolution"], 1000 / values["images_per_second"], result["madds"])
                    curves.setdefault((result["name"], side), {})[result["resolution"]] = point
    return {key: [points[r] for r in sorted(points)] for key, points in curves.items() if len(points) > 1}


def draw_resolutions(results: Sequence[dict], path: Path) -> None:
    """Draw milliseconds per image against resolution; a dashed line is in proportion to multiply-adds."""
    figure, axes = make_figure(8, 5)
    curves = list_resolutions(results)
    models = list(dict.fromkeys(model for model, _ in curves))
    for (model, side), points in curves.items():
        sizes, times, madds = np.array(points).T
        marker, label = _MARKERS[models.index(model)], f"{model.removeprefix('mobilenet_')}, {side}"
        axes.plot(sizes, times, color=_COLORS[side], marker=marker, label=label)
        axes.plot(sizes, times[-1] * madds / madds[-1], color=_COLORS[side], linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({point[0] for points in curves.values() for point in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    y_label = "training step, milliseconds per image\n(dashed: in proportion to multiply-adds)"
    style_axes(axes, x_label="resolution, pixels", y_label=y_label)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)
