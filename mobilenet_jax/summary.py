"""Print the costs of a MobileNet, row by row: python -m mobilenet_jax.summary mobilenet_v2 --width=0.5

With --diff A B, print the differences between two networks. Each is given as MODEL or MODEL:CONVENTION.
"""

import argparse
import json
import sys

from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.summary import diff_specs, format_diff, format_table, format_totals, make_summary
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS, make_spec


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help=", ".join(MODELS))
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier; default: 1")
    parser.add_argument("--resolution", type=int, default=224, help="image height and width in pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="0: without the classifier; default: 1000")
    parser.add_argument("--convention", default="keras", help=f"{', '.join(CONVENTIONS)}; default: keras")
    parser.add_argument("--json", action="store_true", help="print the totals, or the differences, as JSON")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print the differences between two networks")
    parser.add_argument("--list", action="store_true", help="print the names of the models")
    flags = parser.parse_args(argv)
    if flags.model is None and not (flags.list or flags.diff):
        parser.error(f"a model is missing; valid: {', '.join(MODELS)}")
    return flags


def run(flags: argparse.Namespace) -> int:
    """Print the names, the differences, or the table with the totals; return the exit code."""
    if flags.list:
        print("\n".join(MODELS))
        return 0
    try:
        if flags.diff:
            left, right = (_make_spec(name, flags) for name in flags.diff)
            differences = diff_specs(left, right, flags.resolution)
            text = format_diff(differences, flags.diff) if differences else "no difference"
            print(json.dumps(differences) if flags.json else text)
            return 0
        spec = make_spec(flags.model, width=flags.width, num_classes=flags.num_classes, convention=flags.convention)
        summary = make_summary(spec, flags.resolution)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if flags.json:
        print(json.dumps({**summary, "width": flags.width, "convention": flags.convention}))
        return 0
    print(f"{flags.model}, width {flags.width:g}, {flags.resolution} px, {flags.convention} convention\n")
    print(format_table(compute_cost(spec, flags.resolution)))
    print("\n" + format_totals(summary))
    return 0


def _make_spec(name: str, flags: argparse.Namespace) -> Spec:
    """Make the network MODEL or MODEL:CONVENTION with the width and classes of the command line."""
    model, _, convention = name.partition(":")
    convention = convention or flags.convention
    return make_spec(model, width=flags.width, num_classes=flags.num_classes, convention=convention)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a mistake in the command line."""
    flags = parse(argv)
    return get_exit_code(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
