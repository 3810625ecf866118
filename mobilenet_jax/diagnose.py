"""Where a trained network loses information, layer by layer.

    python -m mobilenet_jax.diagnose --weights=FILE_OR_WORKDIR                     what weights alone say
    python -m mobilenet_jax.diagnose --weights=... --data IMAGES_OR_FOLDER...      and these images
    python -m mobilenet_jax.diagnose --weights=... --config configs/v2.py:digits   or a config's evaluation set

--out=DIR gets diagnosis.json (mobilenet_jax/diagnose/report.py says what is in it) and diagnosis.png, one page.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import apply_preprocessing, load_config, split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_weights_flags
from mobilenet_jax.cli.startup import configure_memory, show_own_messages

if TYPE_CHECKING:
    from mobilenet_jax.data.loader import Batch
    from mobilenet_jax.data.transforms import EvalTransform


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, overrides of the config); argparse ends the program where they cannot be understood."""
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
        help="a config file, with an argument as FILE:ARGUMENT; its evaluation set, prepared as the weights' card says "
        "but for overrides (--config.data.KEY=VALUE)",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once; default: %(default)s")
    parser.add_argument("--out", help="folder of diagnosis.json and diagnosis.png; default: print alone")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of findings and table")
    add_cache_flag(parser)
    flags = parser.parse_args(arguments)
    if overrides and not flags.config:
        parser.error(f"{overrides[0]} overrides a key of --config, which is not given")
    if flags.batch_size < 1:
        parser.error(f"batch_size is {flags.batch_size}; valid: 1 or more")
    return flags, overrides


def read_files(files: list[Path], transform: "EvalTransform", *, batch_size: int) -> Iterator["Batch"]:
    """Image files as batches {"images" uint8 [B, S, S, 3], "mask" [B]} of one shape; raises UnreadableImageError."""
    import numpy as np

    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.inference.images import read_batches

    batch_size = min(batch_size, len(files))
    for _, errors, images in read_batches(files, transform, batch_size=batch_size):
        for error in filter(None, errors):
            raise UnreadableImageError(error)
        yield {"images": images, "mask": np.arange(batch_size) < len(errors)}


class Images(NamedTuple):
    """What to look at, and how it is normalised."""

    batches: Iterable["Batch"]
    count: int
    source: str
    size: int  # pixels of a side
    mean: tuple[float, ...]  # grey levels
    std: tuple[float, ...]


def open_images(flags: argparse.Namespace, overrides: list[str], card: dict) -> Images:
    """The images of --data or --config, prepared as the card says; ValueError, OSError for what cannot be."""
    if flags.config:
        from mobilenet_jax.data.loader import make_eval_batches

        config: Any = load_config(flags.config, overrides)
        apply_preprocessing(config, card, overrides)
        if "--config.data.eval_batch_size" not in {override.partition("=")[0] for override in overrides}:
            config.data.eval_batch_size = flags.batch_size
        data = config.data
        batches, count = make_eval_batches(data, process_index=0, process_count=1)
        source = f"the evaluation set of {flags.config}"
        return Images(batches, count, source, data.image_size, data.mean, data.std)
    from mobilenet_jax.data.transforms import EvalTransform
    from mobilenet_jax.inference.images import list_images
    from mobilenet_jax.weights.card import read_preprocessing

    given = read_preprocessing(card, source=f"the weights {card['name']}")
    transform = EvalTransform(given.image_size, given.crop_share, given.interpolation, given.squash)
    files = list_images(flags.data)
    batches = read_files(files, transform, batch_size=flags.batch_size)
    return Images(batches, len(files), ", ".join(flags.data), given.image_size, given.mean, given.std)


def diagnose(flags: argparse.Namespace, overrides: list[str]) -> tuple[dict, tuple]:
    """(report, (model, variables, card)); ValueError, OSError for a command that cannot be obeyed."""
    from mobilenet_jax.diagnosis.activations import measure_activations
    from mobilenet_jax.diagnosis.report import make_report
    from mobilenet_jax.diagnosis.weights import quantise_variables
    from mobilenet_jax.models.cost import compute_cost
    from mobilenet_jax.training.progress import Progress
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.workdir.metrics import METRICS_FILE, read_metrics

    weights = load_weights(flags.weights, flags.name, offline=flags.offline)
    model, variables, card = weights
    tally, images = None, None
    if flags.data or flags.config:
        images = open_images(flags, overrides, card)
        compute_cost(model.spec, images.size)  # says so if the image is too small
        kinds = {"per_tensor": False, "per_channel": True}
        quantised = {k: quantise_variables(model.spec, variables, per_channel=v) for k, v in kinds.items()}
        active = images.count > flags.batch_size
        with Progress(images.count, steps_per_epoch=None, batch_size=1, active=active) as progress:
            tally = measure_activations(
                model,
                variables,
                images.batches,
                mean=images.mean,
                std=images.std,
                quantised=quantised,
                report=lambda done: progress.update(done, {}),
            )
    workdir = Path(flags.weights)
    metrics = read_metrics(workdir) if (workdir / METRICS_FILE).exists() else ()
    source = images.source if images else ""
    return make_report(weights, tally=tally, images=source, metrics=metrics), weights


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Diagnose, write and print; return the exit code."""
    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.diagnosis.page import draw_page
    from mobilenet_jax.diagnosis.report import format_text
    from mobilenet_jax.models.folded import list_layers
    from mobilenet_jax.workdir.files import write_json_atomic

    configure_memory(flags.compilation_cache)
    try:
        report, (model, variables, _) = diagnose(flags, overrides)
        if flags.out:
            out = Path(flags.out)
            out.mkdir(parents=True, exist_ok=True)
            write_json_atomic(out / "diagnosis.json", report)
            draw_page(report, list(list_layers(model.spec, variables)), out / "diagnosis.png")
            print(f"written to {out}: diagnosis.json, diagnosis.png", file=sys.stderr)
    except UnreadableImageError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(json.dumps(report) if flags.json else format_text(report), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, 1 for an unreadable image, 2 for a command that cannot be obeyed."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    show_own_messages()
    # Pillow's, of metadata that nothing here reads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return get_exit_code(lambda: run(flags, overrides))


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
