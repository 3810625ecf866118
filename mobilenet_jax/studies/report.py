"""What the runs of a study say: a row for each, means with intervals, the table and the files. No JAX here."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mobilenet_jax.studies.study import Study, find_runs, hash_config, read_record
from mobilenet_jax.workdir.files import write_atomic
from mobilenet_jax.workdir.metrics import read_metrics

CONFIDENCE = 0.95
COLUMNS = (
    "study",
    "variant",
    "seed",
    "status",
    "params",
    "madds",
    "top1",
    "top5",
    "loss",
    "count",
    "epochs",
    "seconds",
    "images_per_second",
    "config",
    "commit",
)
# The columns that a run killed and continued may have otherwise than one that was not.
COLUMNS_OF_TIME = ("seconds", "images_per_second")


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (n - 1) and half the width of the 95% interval (Student's t) of n values."""

    count: int
    mean: float
    deviation: float  # nan for one value
    half: float  # nan for one value


def summarise(values: Sequence[float]) -> Summary:
    """The summary of at least one value."""
    n = len(values)
    if n == 1:
        return Summary(1, float(values[0]), math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Summary(n, float(np.mean(values)), deviation, quantile * deviation / math.sqrt(n))


def compare(values: Mapping[int, float], base: Mapping[int, float]) -> Summary | None:
    """The summary of the differences of runs of one seed, over the seeds that both have; None where there is none.

    A seed fixes the order and augmentation of the images, and the initial values of what two variants have in common.
    """
    seeds = sorted(values.keys() & base.keys())
    return summarise([values[seed] - base[seed] for seed in seeds]) if seeds else None


def read_rows(study: Study, workdir: Path) -> list[dict[str, Any]]:
    """A row for every run that finished or failed, keys as COLUMNS, in the order of the sweep, then by seed."""
    rows = []
    for key in find_runs(study, workdir):
        folder = key.folder(workdir)
        record = read_record(folder)
        if record is None or record["status"] == "started":
            continue
        finished = record["status"] == "finished"
        result = json.loads((folder / "result.json").read_text()) if finished else {}
        environment = json.loads((folder / "environment.json").read_text())
        cost = study.compute_cost(key.variant, record["num_classes"])
        row = {
            "study": study.name,
            "variant": key.variant,
            "seed": key.seed,
            "status": record["status"],
            "params": cost.params,
            "madds": cost.madds,
            "epochs": result.get("epoch"),
            "seconds": round(record["seconds"], 1),
            "images_per_second": _last_rate(folder),
            "config": hash_config(record["config"]),
            "commit": environment["commit"],
        }
        rows.append({name: row[name] if name in row else result.get(name) for name in COLUMNS})
    return rows


def _last_rate(folder: Path) -> float | None:
    lines = read_metrics(folder)
    rate = lines[-1]["time/images_per_second"] if lines else None
    return None if rate is None else round(rate, 1)


def read_curves(study: Study, workdir: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """{variant: a curve for each finished run, of (epoch, top-1 of the evaluated variables)}."""
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for key in find_runs(study, workdir):
        record = read_record(key.folder(workdir))
        if record is not None and record["status"] == "finished":
            averaged = "eval_ema/top1" if study.config.ema.decay > 0 else "eval/top1"
            lines = [line for line in read_metrics(key.folder(workdir)) if averaged in line]
            curves.setdefault(key.variant, []).append([(line["epoch"], line[averaged]) for line in lines])
    return curves


def collect_top1(rows: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """{variant: {seed: top-1 in %}} of the finished runs."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["status"] == "finished":
            values.setdefault(row["variant"], {})[row["seed"]] = 100 * row["top1"]
    return values


def format_csv(rows: Sequence[Mapping]) -> str:
    """All rows under the names of their columns; what a failed run has not is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def format_table(study: Study, rows: Sequence[Mapping]) -> str:
    """A Markdown table, a line a variant, and how to read it; no times, so that it is a function of the results."""
    values, base = collect_top1(rows), study.baseline
    lines = [
        f"| variant | parameters | multiply-adds | runs | top-1, % | deviation | 95% interval | minus {base} "
        "| 95% interval | paper, % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant, top1 in values.items():
        row = next(row for row in rows if row["variant"] == variant)
        own, paper = summarise(list(top1.values())), study.published.get(variant)
        difference = None if variant == base else compare(top1, values.get(base, {}))
        cells = [
            f"{variant} (base)" if variant == base else variant,
            f"{row['params']:,}",
            f"{row['madds']:,}",
            str(own.count),
            f"{own.mean:.2f}",
            *_format_spread(own),
            *(["", ""] if difference is None else [f"{difference.mean:+.2f}", _format_interval(difference, "+")]),
            "" if paper is None else f"{paper:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"# {study.name}", "", *lines, "", *_format_notes(study, rows)]) + "\n"


def _format_spread(summary: Summary) -> tuple[str, str]:
    deviation = "" if math.isnan(summary.deviation) else f"{summary.deviation:.2f}"
    return deviation, _format_interval(summary, "")


def _format_interval(summary: Summary, sign: str) -> str:
    if math.isnan(summary.half):
        return ""
    return f"{summary.mean - summary.half:{sign}.2f} to {summary.mean + summary.half:{sign}.2f}"


def _format_notes(study: Study, rows: Sequence[Mapping]) -> list[str]:
    data, finished = study.config.data, [row for row in rows if row["status"] == "finished"]
    counts = sorted({f"{row['count']:,}" for row in finished})
    epochs = sorted({f"{row['epochs']:.3g}" for row in finished})
    notes = [
        f"Top-1 on {' or '.join(counts)} images of {data.source} after {' or '.join(epochs)} epochs. Intervals are "
        "Student's t over seeds; differences are in points, paired by seed, and not corrected for their number.",
        "",
        f"Paper: {study.source}.",
        "",
        f"Commit: {', '.join(sorted({str(row['commit']) for row in rows}))}.",
    ]
    if failed := [f"{row['variant']} seed {row['seed']}" for row in rows if row["status"] == "failed"]:
        notes += ["", f"Failed, not in the means: {', '.join(failed)}."]
    return notes


def write_report(study: Study, workdir: Path) -> str | None:
    """Write results.csv, table.md and figure.png of what has finished or failed, each whole; return the table.

    None, and no file, where nothing has. All three are functions of the runs alone, up to COLUMNS_OF_TIME.
    """
    from mobilenet_jax.plots import draw_frontier, draw_variants

    rows = read_rows(study, workdir)
    if not rows:
        return None
    write_atomic(workdir / "results.csv", format_csv(rows))
    top1 = collect_top1(rows)
    if not top1:
        return None
    table = format_table(study, rows)
    write_atomic(workdir / "table.md", table)
    estimates = {}
    for variant, values in top1.items():
        summary = summarise(list(values.values()))
        estimates[variant] = (list(values.values()), summary.mean, summary.half)
    temporary = workdir / "figure.png.tmp"
    title = f"{study.name} on {study.config.data.source}"
    if study.figure == "frontier":
        madds = {row["variant"]: row["madds"] for row in rows}
        draw_frontier(estimates, madds, study.group_variants(), temporary, title=title)
    else:
        draw_variants(estimates, read_curves(study, workdir), study.baseline, temporary, title=title)
    temporary.replace(workdir / "figure.png")
    return table
