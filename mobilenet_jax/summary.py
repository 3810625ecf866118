"""What a MobileNet costs, row by row: `python -m mobilenet_jax.summary mobilenet_v2 --width=0.5`.

With `--diff A B`, where two networks differ, each given as MODEL or MODEL:CONVENTION.

All numbers are arithmetic on the architecture's table; JAX is not imported.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby

from mobilenet_jax.models.cost import Cost, compute_cost
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS, make_spec

_BYTES = 4  # float32


def make_summary(spec: Spec, image_size: int) -> dict:
    """Totals as plain data: the counts of parameters, multiply-adds and activation bytes of one float32 image."""
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
    """A line a row: name, output shape, parameters, multiply-adds, share of all multiply-adds."""
    lines = [f"{'row':<12}{'output':>16}{'params':>14}{'multiply-adds':>18}{'share':>9}"]
    for row, group in groupby(cost.ops, key=lambda c: c.row):
        ops = list(group)
        last = [c for c in ops if not c.op.pooled or len(ops) == 1][-1]
        shape = f"{last.height}x{last.width}x{last.op.filters}"
        params, madds = sum(c.op.params for c in ops), sum(c.madds for c in ops)
        lines.append(f"{row:<12}{shape:>16}{params:>14,}{madds:>18,}{madds / cost.madds:>9.1%}")
    return "\n".join(lines)


def format_totals(summary: dict) -> str:
    """The totals under the table."""
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
    """Where two networks differ: a dict of row ("" for the whole network), field, left and right, in order.

    A field that one of them lacks is None there. Rows are paired by name.
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
    """Row -> what there is to compare: the totals and the spec's fields under "", then each row's with its costs."""
    data, cost, totals = to_json(spec), compute_cost(spec, image_size), make_summary(spec, image_size)
    described = {row.pop("name"): row for row in data.pop("rows")}
    for row, group in groupby(cost.ops, key=lambda c: c.row):
        ops = list(group)
        costs = {"params": sum(c.op.params for c in ops), "madds": sum(c.madds for c in ops)}
        described[row] = {**described.get(row, {}), **costs}
    del totals["model"], totals["channels"]
    return {"": {**totals, **data}, **described}


def format_diff(differences: list[dict], names: Sequence[str]) -> str:
    """A line a difference under the names of the two."""
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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.summary", description="What a MobileNet costs, row by row."
    )
    parser.add_argument("model", nargs="?", help=", ".join(MODELS))
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier")
    parser.add_argument("--resolution", type=int, default=224, help="image height and width in pixels")
    parser.add_argument("--num_classes", type=int, default=1000, help="0: without the classifier")
    parser.add_argument("--convention", default="keras", help=", ".join(CONVENTIONS))
    parser.add_argument("--json", action="store_true", help="print the totals as JSON")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="where two of MODEL or MODEL:CONVENTION differ")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    args = parser.parse_args(argv)
    if args.model is None and not (args.list or args.diff):
        parser.error(f"which model? valid: {', '.join(MODELS)}")
    return args


def _make_spec(name: str, args: argparse.Namespace) -> Spec:
    """The network MODEL or MODEL:CONVENTION at the width and classes of the command line."""
    model, _, convention = name.partition(":")
    convention = convention or args.convention
    return make_spec(model, width=args.width, num_classes=args.num_classes, convention=convention)


def _print_diff(args: argparse.Namespace) -> None:
    left, right = (_make_spec(name, args) for name in args.diff)
    differences = diff_specs(left, right, args.resolution)
    if args.json:
        print(json.dumps(differences))
    else:
        print(format_diff(differences, args.diff) if differences else "no difference")


def main(argv: list[str] | None = None) -> int:
    """Print the table, or JSON; return the exit code."""
    args = _parse(argv)
    if args.list:
        print("\n".join(MODELS))
        return 0
    try:
        if args.diff:
            _print_diff(args)
            return 0
        spec = make_spec(args.model, width=args.width, num_classes=args.num_classes, convention=args.convention)
        summary = make_summary(spec, args.resolution)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**summary, "width": args.width, "convention": args.convention}))
        return 0
    print(f"{args.model}, width {args.width:g}, {args.resolution} px, {args.convention} convention\n")
    print(format_table(compute_cost(spec, args.resolution)))
    print("\n" + format_totals(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
