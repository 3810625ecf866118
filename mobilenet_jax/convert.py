"""Convert weights of any format to ours, torchvision's or timm's: python -m mobilenet_jax.convert SOURCE DESTINATION"""

import argparse
import sys

from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_weights_flags
from mobilenet_jax.weights import CLASSIFIERS, FORMATS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags; argparse ends the program if it cannot understand them."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.convert",
        description="Write weights of another framework or of a run of ours to one file.",
    )
    add_weights_flags(parser, "source")
    parser.add_argument("destination", help="a .safetensors file, or .pth with --format=torchvision or timm")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s, which is ours")
    parser.add_argument(
        "--classifier", choices=CLASSIFIERS, default="keep", help="drop: without the layers behind the pooling"
    )
    parser.add_argument("--in_channels", type=int, help="sum the stem's kernel for so many input channels")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
    """Convert, and print what was converted; return the exit code."""
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.weights.save import save_weights

    try:
        model, variables, card = load_weights(
            flags.source,
            flags.name,
            offline=flags.offline,
            select=flags.select,
            classifier=flags.classifier,
            in_channels=flags.in_channels,
        )
        beside = save_weights(flags.destination, model, variables, card, format=flags.format)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    notes = "".join(f"; {note}" for note in card["notes"])
    print(f"{flags.destination}: {card['name']}, {model.spec.num_classes} classes, as {flags.format}{notes}")
    if beside:
        print(
            f"{beside}: class names, preprocessing and metrics, which a {flags.format} file cannot hold; keep it beside"
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for a command that cannot be obeyed."""
    flags = parse(argv)
    return get_exit_code(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
