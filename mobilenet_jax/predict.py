"""Name what is on images: python -m mobilenet_jax.predict --weights=FILE_OR_WORKDIR IMAGES_OR_FOLDER...

In Python: for prediction in predict(load_weights(FILE_OR_WORKDIR), [IMAGES_OR_FOLDER, ...]), and of an exported .tflite
or .onnx file with `exporting.contract.read_exported` in the place of `load_weights`.
"""

import argparse
import io
import sys
import warnings
from typing import Any

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_weights_flags
from mobilenet_jax.cli.startup import configure_memory, show_own_messages
from mobilenet_jax.data import DECODES
from mobilenet_jax.inference.formats import print_predictions
from mobilenet_jax.inference.predict import Answer, Prediction, predict

__all__ = ["Answer", "Prediction", "main", "predict"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags; argparse ends the program if it cannot understand them."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.predict", description="Print the most probable classes of images."
    )
    parser.add_argument("images", nargs="+", help="image files, and folders of images at any depth")
    add_weights_flags(parser, "--weights", use="an exported .tflite or .onnx file, or ", required=True)
    parser.add_argument("--top", type=int, default=5, help="number of classes for an image; default: %(default)s")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print a JSON array, one image on each line")
    formats.add_argument("--csv", action="store_true", help="print the columns path, rank, class, probability, index")
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once; default: %(default)s")
    parser.add_argument(
        "--decode",
        choices=DECODES,
        default=DECODES[0],
        help="fast: decode large JPEGs at a half, a quarter or an eighth of their size; default: %(default)s",
    )
    add_cache_flag(parser)
    return parser.parse_args(argv)


def _open_weights(flags: argparse.Namespace) -> Any:
    """Return weights, or an exported file; for the latter JAX is not imported, which takes a second."""
    from mobilenet_jax.exporting.contract import is_exported, read_exported

    if is_exported(flags.weights):
        return read_exported(flags.weights)
    from mobilenet_jax.weights.load import load_weights

    configure_memory(flags.compilation_cache)
    return load_weights(flags.weights, flags.name, offline=flags.offline, select=flags.select)


def run(flags: argparse.Namespace) -> int:
    """Predict and print; return the exit code."""
    from mobilenet_jax.data.image_files import list_images

    try:
        files = list_images(flags.images)
        weights = _open_weights(flags)
        predictions = predict(weights, files, top=flags.top, batch_size=flags.batch_size, decode=flags.decode)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    form = "json" if flags.json else "csv" if flags.csv else "text"
    return int(print_predictions(predictions, len(files), form=form, progress=len(files) > flags.batch_size) > 0)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if an image failed, 2 for a command that cannot be obeyed."""
    flags = parse(argv)
    show_own_messages()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that nothing here reads
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are any bytes
    return get_exit_code(lambda: run(flags))


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
