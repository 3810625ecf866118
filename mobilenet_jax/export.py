"""Write a network for a phone, a browser or another runtime: python -m mobilenet_jax.export --weights=FILE_OR_WORKDIR

The folder of --out gets the file, its contract (input, output, classes, card) as JSON, and report.json: the differences
from JAX, size, operations and latency. If a float file differs from JAX by more than 1e-4 of the largest logit, nothing
is written and the exit code is 1.
"""

import argparse
import sys
import warnings

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_weights_flags
from mobilenet_jax.cli.startup import configure_memory, show_own_messages
from mobilenet_jax.exporting import EXPORT_FORMATS, QUANTIZATIONS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags; argparse ends the program if it cannot understand them."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_weights_flags(parser, "--weights", required=True)
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="what the file is for")
    parser.add_argument("--out", help="a folder; default: exports/NAME_FORMAT")
    parser.add_argument(
        "--batch",
        type=_parse_batch,
        help="the number of images at once, or dynamic; default: 1 for tflite, dynamic for the others",
    )
    parser.add_argument("--resolution", type=int, help="pixels of a side; default: what the weights are made for")
    parser.add_argument(
        "--preprocess", action="store_true", help="normalise inside the file, so that it takes uint8 pixels"
    )
    parser.add_argument("--quantize", choices=QUANTIZATIONS, default="none", help="default: none, which is float32")
    parser.add_argument(
        "--calibration",
        metavar="FOLDER_OR_DATA",
        help="a folder of images, or a config file for its training images: the ranges of int8 are measured on them, "
        "and the file is compared with JAX on them; default: compare on random pixels",
    )
    parser.add_argument("--per_tensor", action="store_true", help="int8: one scale for all filters of a layer")
    parser.add_argument("--float_ends", action="store_true", help="int8 in a .tflite file: float32 in and out")
    parser.add_argument(
        "--litertjs",
        metavar="DIR",
        help="web: a folder in which npm has installed LiteRT.js, which is kept; default: what was kept, or call npm",
    )
    add_cache_flag(parser)
    return parser.parse_args(argv)


def _parse_batch(text: str) -> int | str:
    if text == "dynamic" or (text.isdecimal() and int(text) > 0):
        return text if text == "dynamic" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r}; valid: 1 or more, or dynamic")


def run(flags: argparse.Namespace) -> int:
    """Export and print the report; return the exit code."""
    from mobilenet_jax.exporting.export import ParityError, export_weights
    from mobilenet_jax.exporting.litertjs import install_litertjs
    from mobilenet_jax.exporting.report import format_report

    configure_memory(flags.compilation_cache)
    try:
        if flags.litertjs is not None:
            if flags.format != "web":
                raise ValueError("--litertjs is for --format=web")
            install_litertjs(flags.litertjs)
        report = export_weights(
            flags.weights,
            format=flags.format,
            out=flags.out,
            batch=flags.batch,
            resolution=flags.resolution,
            preprocess=flags.preprocess,
            quantize=flags.quantize,
            calibration=flags.calibration,
            per_tensor=flags.per_tensor,
            float_ends=flags.float_ends,
            name=flags.name,
            select=flags.select,
            offline=flags.offline,
        )
    except ParityError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(format_report(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 for a file that differs, 2 for a command that cannot be obeyed."""
    flags = parse(argv)
    show_own_messages()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that nothing here reads
    return get_exit_code(lambda: run(flags))


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
