"""The costs of a network as text and as plain data, and the differences between two networks, without JAX."""

from collections.abc import Sequence
from itertools import groupby

from mobilenet_jax.models.cost import Cost, compute_cost
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.spec_json import to_json

_BYTES = 4  # of a float32 number


def make_summary(spec: Spec, image_size: int) -> dict:
    """Return the totals as plain data: parameters, and multiply-adds and activation bytes of one float32 image."""
    cost = compute_cost(spec, image_size)
    standard_params, standard_madds = cost.standard
    return {
        "model": spec.name,
        "resolution": image_size,
        "num_classes": spec.num_classes,
        "params": cost.params,
        "batch_stats": cost.batch_stats,
        "madds": cost.madds,
        "attention_madds": cost.attention_madds,
        "channels": list(cost.channels),
        "activation_bytes_inference": cost.inference_elements * _BYTES,
        "activation_bytes_training": cost.training_elements * _BYTES,
        "standard_params": standard_params,
        "standard_madds": standard_madds,
    }


def format_table(cost: Cost) -> str:
    """Format one line for each row: name, output shape, parameters, multiply-adds, share of all multiply-adds."""
    lines = [f"{'row':<12}{'output':>16}{'params':>14}{'multiply-adds':>18}{'share':>9}"]
    for row, group in groupby(cost.ops, key=lambda c: c.row):
        ops = list(group)
        last = [c for c in ops if not c.op.pooled or len(ops) == 1][-1]
        shape = f"{last.height}x{last.width}x{last.op.filters}"
        params, madds = sum(c.op.params for c in ops), sum(c.madds for c in ops)
        lines.append(f"{row:<12}{shape:>16}{params:>14,}{madds:>18,}{madds / cost.madds:>9.1%}")
    return "\n".join(lines)


def format_totals(summary: dict) -> str:
    """Format the totals of `make_summary`, one to a line."""
    ratio = summary["standard_madds"] / summary["madds"]
    rows = [
        ("trainable parameters", f"{summary['params']:,}"),
        ("batch-norm statistics", f"{summary['batch_stats']:,}"),
        ("multiply-adds", f"{summary['madds']:,}"),
        ("attention multiply-adds", f"{summary['attention_madds']:,}"),
        ("activations, inference", f"{summary['activation_bytes_inference']:,} bytes an image (largest live set)"),
        ("activations, training", f"{summary['activation_bytes_training']:,} bytes an image (kept for backward)"),
        (
            "with standard convolutions",
            f"{summary['standard_params']:,} parameters, {summary['standard_madds']:,} multiply-adds: "
            f"{ratio:.2f} times as many",
        ),
    ]
    return "\n".join(f"{name:<28}{text}" for name, text in rows)


def diff_specs(left: Spec, right: Spec, image_size: int) -> list[dict]:
    """List the differences between two networks, in order, as dicts with the keys row, field, left and right.

    Rows are paired by name; the row "" is the network as a whole. A field that one network lacks is None there.
    """
    tables = [_describe_rows(spec, image_size) for spec in (left, right)]
    found = []
    for row in dict.fromkeys((*tables[0], *tables[1])):
        fields = [table.get(row, {}) for table in tables]
        for field in dict.fromkeys((*fields[0], *fields[1])):
            a, b = (f.get(field) for f in fields)
            if a != b:
                found.append({"row": row, "field": field, "left": a, "right": b})
    return found


def _describe_rows(spec: Spec, image_size: int) -> dict[str, dict]:
    """Return the fields to compare, by row: under "" the totals and the network's own fields, then each row's."""
    data, cost, totals = to_json(spec), compute_cost(spec, image_size), make_summary(spec, image_size)
    described = {row.pop("name"): row for row in data.pop("rows")}
    for row, group in groupby(cost.ops, key=lambda c: c.row):
        ops = list(group)
        costs = {"params": sum(c.op.params for c in ops), "madds": sum(c.madds for c in ops)}
        described[row] = {**described.get(row, {}), **costs}
    del totals["model"], totals["channels"]
    return {"": {**totals, **data}, **described}


def format_diff(differences: list[dict], names: Sequence[str]) -> str:
    """Format one line for each difference, under the names of the two networks."""
    lines = [["row", "field", *names]]
    for d in differences:
        lines.append([d["row"] or "network", d["field"], _format_value(d["left"]), _format_value(d["right"])])
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("".join(line).rstrip() for line in padded)


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={entry}" for key, entry in value.items())
    if value is None or isinstance(value, bool | str):
        return "-" if value in (None, "") else str(value)
    return f"{value:,}"
