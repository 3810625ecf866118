"""How far an exported file is from the network: differences, agreement, size, operations and latency."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LIMIT = 1e-4  # of the largest logit: a float file with a larger difference is wrong
THREADS = (1, 2)
_ROUNDS = 15


def compare_logits(got: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Return the largest and mean difference over the largest logit, and the share of equal best classes.

    Numbers that are not finite make the difference infinite.
    """
    scale = float(np.abs(wanted).max()) or 1.0
    differences = np.abs(got.astype(np.float64) - wanted)
    finite = bool(np.isfinite(differences).all())
    return {
        "max_difference": float(differences.max()) / scale if finite else float("inf"),
        "mean_difference": float(differences.mean()) / scale if finite else float("inf"),
        "top1_agreement": float((got.argmax(-1) == wanted.argmax(-1)).mean()),
    }


def measure_in_turns(answers: Mapping[str, tuple[Callable, np.ndarray]]) -> dict[str, float]:
    """Return the median milliseconds of each function on its input.

    They run in turns, so that a slow phase of the machine is shared by all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in answers}
    for i in range(_ROUNDS + 2):
        for name, (answer, images) in answers.items():
            start = time.perf_counter()
            answer(images)
            if i >= 2:  # the first calls allocate and compile
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def format_report(report: dict[str, Any]) -> str:
    """Return the report as a table of two columns; of a page, one table for each network."""
    if report["format"] == "web":
        tables = [format_report(model) for model in report["models"].values()]
        page = f"page, {report['bytes'] / 1e6:.1f} MB: {report['file']}"
        serve = f"open it: python -m http.server --directory {report['file'].removesuffix('/index.html')}"
        return "\n\n".join([*tables, f"{page}\n{serve}"])
    latency = report["latency_ms"]
    operations = sorted(report["operations"].items(), key=lambda item: (-item[1], item[0]))
    rows = {
        "file": report["file"],
        "size": f"{report['bytes'] / 1e6:.2f} MB",
        "images": f"{report['images']['count']} {report['images']['source']}",
        "largest difference from JAX": f"{report['max_difference']:.1e} of the largest logit",
        "mean difference": f"{report['mean_difference']:.1e}",
        "same best class": f"{report['top1_agreement']:.0%}",
        **_describe_simulation(report),
        "operations": ", ".join(f"{count} {name}" for name, count in operations),
        "partitions of the accelerator": "none" if report["delegates"] is None else str(report["delegates"]),
        **{
            f"latency, {name}": "; ".join(f"{kind} {ms:.1f} ms" for kind, ms in times.items())
            for name, times in latency.items()
        },
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _describe_simulation(report: dict[str, Any]) -> dict[str, str]:
    if "simulation_equal" not in report:
        return {}
    equal, steps = report["simulation_equal"], report["simulation_steps"]
    return {"equal to the int8 simulation": f"{equal:.2%} of the logits, the others within {steps} steps"}
