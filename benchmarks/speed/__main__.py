"""Compare the speed of training, inference, input and start-up with the frameworks that are installed.

Each side runs in a process of its own. The sides take turns on the same cores, and a ratio compares two sides in the
same round.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.speed.cases import PEERS, PHOTOGRAPH, WHAT
from benchmarks.speed.run import FOREIGN, measure_all
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.models.zoo import MODELS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program with a usage error for an invalid value."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Sides: ours, and\n" + "\n".join(f"  {name:<13} {text}" for name, text in PEERS.items()),
    )
    add = parser.add_argument
    models = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    add(
        "--what",
        type=_list_of(str, WHAT),
        default=["train", "infer"],
        help=f"any of {', '.join(WHAT)}; default: train,infer",
    )
    add(
        "--models",
        type=_list_of(str, tuple(MODELS)),
        default=list(models),
        help="names that `summary` knows; default: V1 to V3",
    )
    add("--against", type=_list_of(str, tuple(PEERS)), default=list(PEERS), help="peers, or '' for none; default: all")
    add("--width", type=_list_of(float), default=[1.0], help="width multipliers; default: 1")
    add("--resolution", type=_list_of(int), default=[224], help="pixels; default: 224")
    add("--batch_size", type=_list_of(int), default=[16], help="images in a step; default: 16")
    add("--rounds", type=int, default=5, help="timed turns of each side; default: 5")
    add("--seconds", type=float, default=2.0, help="approximate length of a turn; default: 2")
    add("--threads", type=int, default=2, help="cores that all sides run on; default: 2")
    add("--options", type=_options, default={}, help='options of create_model: \'{"dtype": "bfloat16"}\'')
    add("--photographs", type=int, default=2000, help="JPEGs that are made for input and predict; default: 2000")
    add(
        "--photograph_size",
        metavar="WIDTHxHEIGHT",
        type=_size,
        default=PHOTOGRAPH,
        help="pixels of the JPEGs, such as 4000x3000; default: 500x375",
    )
    add("--workers", type=int, default=0, help="data.workers of our loader; default: 0")
    for peer in FOREIGN:
        add(f"--python_{peer}", metavar="PYTHON", type=_program, help=f"the interpreter in which {peer} runs")
    add("--json", metavar="FILE", type=Path, help="write all numbers to this file after each case")
    add("--draw", metavar="FILE", type=Path, nargs="+", help="draw and tabulate files of --json instead of measuring")
    add("--out", metavar="DIR", type=Path, default=Path("docs"), help="folder of the figures of --draw; default: docs")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.photographs, *args.width, *args.resolution, *args.batch_size) <= 0:
        parser.error("rounds, threads, photographs, widths, resolutions and batch sizes must be above 0")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    return args


def _list_of(kind: type, valid: tuple[str, ...] = ()):
    def read(text: str) -> list:
        values = [kind(part) for part in text.split(",") if part]
        for value in values if valid else ():
            try:
                check_choice("one of them", value, valid)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        return values

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def _options(text: str) -> dict:
    valid = "valid: a JSON object of create_model's options except lowering, which distinguishes our side from flax"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON; {valid}") from error
    if not isinstance(options, dict) or "lowering" in options:
        raise argparse.ArgumentTypeError(f"{text!r}; {valid}")
    return options


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; valid: WIDTHxHEIGHT in pixels, up to 9999x9999, such as 4000x3000")
    return int(found[1]), int(found[2])


def _program(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return text


def draw(files: list[Path], out: Path) -> int:
    """Print the table of the files of --json, draw their figures into a folder, and return the exit code."""
    from benchmarks.speed.charts import draw_all, format_table

    results = [result for file in files for result in json.loads(file.read_text())["results"]]
    print(format_table(results))
    for path in draw_all(results, out):
        print(path)
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure or draw; return the exit code."""
    try:
        return draw(args.draw, args.out) if args.draw else measure_all(args)
    except BrokenPipeError:  # an OSError that is not the user's mistake
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if a side failed, 2 for a command that cannot be run."""
    args = parse(argv)
    return get_exit_code(
        lambda: run(args), interrupted="interrupted; the file of --json has the cases that were measured"
    )


if __name__ == "__main__":
    sys.exit(main())
