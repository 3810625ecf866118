"""Weights of any format into ours, torchvision's or timm's: `python -m mobilenet_jax.convert SOURCE DESTINATION`."""

import argparse
import sys

FORMATS = ("safetensors", "torchvision", "timm")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.convert",
        description="Weights of torchvision, timm, Keras or a run of ours into one file.",
    )
    parser.add_argument(
        "source",
        help="a .pth, .safetensors, .h5 or .keras file, the workdir of a run, or a name: torchvision/mobilenet_v2, "
        "keras/MobileNetV2, hf:timm/mobilenetv2_100.ra_in1k",
    )
    parser.add_argument("destination", help="a .safetensors file; of another framework's format also .pth")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s, ours")
    parser.add_argument(
        "--name", help="the model in the source, as timm/tf_mobilenetv3_large_100, where it is asked for"
    )
    parser.add_argument("--offline", action="store_true", help="take what was downloaded before, no network")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Convert, and say what was converted; return the exit code."""
    flags = _parse(argv)
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.weights.save import save_weights

    try:
        model, variables, card = load_weights(flags.source, flags.name, offline=flags.offline)
        save_weights(flags.destination, model, variables, card, format=flags.format)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    notes = "".join(f"; {note}" for note in card["notes"])
    print(f"{flags.destination}: {card['name']}, {model.spec.num_classes} classes, as {flags.format}{notes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
