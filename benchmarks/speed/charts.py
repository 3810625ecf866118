"""Pictures of a benchmark's numbers: ratios as bars, cost against resolution as curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullLocator

# Okabe and Ito's colours, told apart by colour-blind readers.
_COLORS = {
    "ours": "#0072B2",
    "torch": "#D55E00",
    "keras": "#CC79A7",
    "flax": "#009E73",
    "litert": "#56B4E9",
    "tfdata": "#E69F00",
}
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_all(results: Sequence[dict], out: Path) -> list[Path]:
    """Draw what the results allow into the folder `out`: ratios.png, resolution.png; return their paths.

    Raises ValueError where they allow nothing.
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
    """A Markdown table of the cases that were timed: images/s of ours, then of each peer with ours over it (range)."""
    timed = [
        result for result in results if result["what"] != "startup" and result["sides"].get("ours", {}).get("seconds")
    ]
    peers = [side for side in _COLORS if side != "ours" and any(side in result["ratios"] for result in timed)]
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
    """A bar for each case and peer: how many times as fast ours is (median), with the range over the rounds."""
    bars = [
        (_label(result), side, ratio)
        for result in results
        if result["group"] != "scaling"
        for side, ratio in result.get("ratios", {}).items()
    ]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(bars)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, (_, side, ratio) in enumerate(bars):
        median = ratio["median"]
        spread = [[median - ratio["min"]], [ratio["max"] - median]]
        # From 1, since a logarithmic axis has no 0: to the right of it ours is faster, to the left slower.
        axes.barh(row, median - 1, left=1, xerr=spread, color=_COLORS[side], ecolor="#444444", capsize=3, height=0.7)
        axes.annotate(f"{median:.2f}", (ratio["max"], row), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{label}: {side}" for label, side, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.axvline(1, color="#444444", linewidth=1)
    axes.margins(x=0.1)
    axes.set_xlabel("how many times as fast as the peer; bar: median, line: range over the rounds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _label(result: dict) -> str:
    name = result["name"].removeprefix("mobilenet_")
    return f"{result['what']} {name}, {result['resolution']} px, batch {result['batch_size']}"


def list_resolutions(results: Sequence[dict]) -> dict[tuple[str, str], list[tuple[int, float, int]]]:
    """{(model, side): [(resolution, milliseconds an image, multiply-adds), ...]} of scaling, from two points on.

    Only resolution differs among the points of a curve: they have the other values of the first case, the base.
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
    """Milliseconds an image against resolution; dashed, what multiply-adds predict from the largest image."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
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
    axes.set_xlabel("resolution, pixels")
    axes.set_ylabel("training step, milliseconds an image\n(dashed: in proportion to multiply-adds)")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
