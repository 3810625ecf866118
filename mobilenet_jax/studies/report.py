"""The report of a study: a row for each run, means with intervals, the table and the files.

Nothing here imports JAX.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mobilenet_jax.studies.records import find_runs, read_record
from mobilenet_jax.studies.study import RunKey, Study, hash_config
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
# Columns that differ between a run that was killed and continued and one that was not.
COLUMNS_OF_TIME = ("seconds", "images_per_second")


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (over n - 1) and half the width of the 95% interval (Student's t) of n values."""

    count: int
    mean: float
    deviation: float  # nan for one value
    half: float  # nan for one value


def summarise(values: Sequence[float]) -> Summary:
    """Summarise one or more values."""
    n = len(values)
    if n == 1:
        return Summary(1, float(values[0]), math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Summary(n, float(np.mean(values)), deviation, quantile * deviation / math.sqrt(n))


def compare(values: Mapping[int, float], base: Mapping[int, float]) -> Summary | None:
    """Summarise the differences between runs with equal seeds; return None if the two share no seed.

    A seed fixes the order and augmentation of the images, and the initial values of the parameters that two variants
    have in common.

    Args:
      values: for each seed, the result of a variant.
      base: for each seed, the result of the base.
    """
    seeds = sorted(values.keys() & base.keys())
    return summarise([values[seed] - base[seed] for seed in seeds]) if seeds else None


def read_rows(study: Study, workdir: Path) -> list[dict[str, Any]]:
    """Return a row with the keys COLUMNS for each run that finished or failed, in sweep order, then by seed.

    A run with a file that is damaged has the status "damaged" and no results; a warning names the file.
    """
    rows = []
    for key in find_runs(study, workdir):
        folder = key.folder(workdir)
        record = read_record(folder)
        if record is None or record["status"] == "started":
            continue
        files = _read_files(folder, finished=record["status"] == "finished")
        cost = study.compute_cost(key.variant, record["num_classes"])
        row = {
            "study": study.name,
            "variant": key.variant,
            "seed": key.seed,
            "params": cost.params,
            "madds": cost.madds,
            "seconds": round(record["seconds"], 1),
            "config": hash_config(record["config"]),
            **({"status": "damaged"} if files is None else {"status": record["status"], **files}),
        }
        rows.append({name: row.get(name) for name in COLUMNS})
    return rows


def _read_files(folder: Path, *, finished: bool) -> dict[str, Any] | None:
    """Return the columns of a row that the files of a run give, or None, with a warning, if a file is damaged."""
    try:
        result = _read_json(folder / "result.json") if finished else {}
        environment = _read_json(folder / "environment.json")
        lines = read_metrics(folder)
    except ValueError as error:
        logging.warning("%s; this run is left out of the table", error)
        return None
    rate = lines[-1]["time/images_per_second"] if lines else None
    return {
        **result,
        "epochs": result.get("epoch"),
        "images_per_second": None if rate is None else round(rate, 1),
        "commit": environment["commit"],
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_curves(study: Study, workdir: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """Return, for each variant, a learning curve per finished run: a list of (epoch, top-1 as a share).

    If the study averages its variables, the curve shows the averaged variables. Runs with damaged files have no curve.
    """
    averaged = "eval_ema/top1" if study.config.ema.decay > 0 else "eval/top1"
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for row in read_rows(study, workdir):
        if row["status"] == "finished":
            lines = [
                line for line in read_metrics(RunKey(row["seed"], row["variant"]).folder(workdir)) if averaged in line
            ]
            curves.setdefault(row["variant"], []).append([(line["epoch"], line[averaged]) for line in lines])
    return curves


def collect_top1(rows: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """Return {variant: {seed: top-1 in %}} for the finished runs."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["status"] == "finished":
            values.setdefault(row["variant"], {})[row["seed"]] = 100 * row["top1"]
    return values


def format_csv(rows: Sequence[Mapping]) -> str:
    """Format all rows as CSV with a header; cells that a failed run lacks are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def format_table(study: Study, rows: Sequence[Mapping]) -> str:
    """Format a Markdown table with one line for each variant, and notes on how to read it.

    There are no times in it, so that equal results give equal tables.
    """
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
            "" if math.isnan(own.deviation) else f"{own.deviation:.2f}",
            _format_interval(own, ""),
            *(["", ""] if difference is None else [f"{difference.mean:+.2f}", _format_interval(difference, "+")]),
            "" if paper is None else f"{paper:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"# {study.name}", "", *lines, "", *_format_notes(study, rows)]) + "\n"


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
        f"Commit: {', '.join(sorted({str(row['commit']) for row in rows if row['status'] != 'damaged'}))}.",
    ]
    if failed := [f"{row['variant']} seed {row['seed']}" for row in rows if row["status"] == "failed"]:
        notes += ["", f"Failed, not in the means: {', '.join(failed)}."]
    if damaged := [f"{row['variant']} seed {row['seed']}" for row in rows if row["status"] == "damaged"]:
        notes += ["", f"Left out, because their files are damaged: {', '.join(damaged)}."]
    return notes


def write_report(study: Study, workdir: Path) -> str | None:
    """Write results.csv, table.md and figure.png, each atomically, and return the table.

    If no run has finished, return None and write at most results.csv, which lists the runs that failed. Except for
    COLUMNS_OF_TIME, equal runs give equal files.
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
