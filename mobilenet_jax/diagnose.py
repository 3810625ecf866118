"""Show where a trained network loses information, layer by layer.

    python -m mobilenet_jax.diagnose --weights=FILE_OR_WORKDIR                     measure the weights alone
    python -m mobilenet_jax.diagnose --weights=... --data IMAGES_OR_FOLDER...      and the activations on these images
    python -m mobilenet_jax.diagnose --weights=... --config configs/v2.py:digits   or on a config's evaluation set

With --out=DIR, DIR gets diagnosis.json (mobilenet_jax/diagnosis/report.py describes its keys) and diagnosis.png, one
page.
"""

import argparse
import json
import sys
import warnings

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_weights_flags
from mobilenet_jax.cli.startup import configure_memory, show_own_messages


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (flags, overrides of the config); end the program by argparse if they cannot be understood."""
    arguments, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.diagnose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_weights_flags(parser, "--weights", required=True)
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--data", nargs="+", metavar="PATH", help="image files, and folders of them at any depth")
    images.add_argument(
        "--config",
        help="a config file, with an argument as FILE:ARGUMENT; its evaluation set is prepared as the card of the "
        "weights says, unless an override (--config.data.KEY=VALUE) says otherwise",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once; default: %(default)s")
    parser.add_argument("--out", help="folder of diagnosis.json and diagnosis.png; default: print only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of text")
    add_cache_flag(parser)
    flags = parser.parse_args(arguments)
    if overrides and not flags.config:
        parser.error(f"{overrides[0]} overrides a key of --config, which is not given")
    if flags.batch_size < 1:
        parser.error(f"batch_size is {flags.batch_size}; valid: 1 or more")
    return flags, overrides


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Diagnose and print; return the exit code."""
    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.diagnosis.report import format_text
    from mobilenet_jax.diagnosis.run import diagnose

    configure_memory(flags.compilation_cache)
    try:
        report = diagnose(
            flags.weights,
            flags.name,
            offline=flags.offline,
            select=flags.select,
            data=flags.data or (),
            config=flags.config,
            overrides=overrides,
            batch_size=flags.batch_size,
            out=flags.out,
        )
    except UnreadableImageError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if flags.out:
        print(f"written to {flags.out}: diagnosis.json, diagnosis.png", file=sys.stderr)
    print(json.dumps(report) if flags.json else format_text(report), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 for an unreadable image, 2 for a command that cannot be run."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    show_own_messages()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns of damaged metadata, which nothing here reads
    return get_exit_code(lambda: run(flags, overrides))


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
