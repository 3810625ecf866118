"""What is on images: python -m mobilenet_jax.predict --weights=FILE_OR_WORKDIR IMAGES_OR_FOLDER...

In Python: for prediction in predict(load_weights(FILE_OR_WORKDIR), [IMAGES_OR_FOLDER, ...])
"""

import argparse
import csv
import functools
import io
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag
from mobilenet_jax.cli.startup import configure_memory, show_own_messages

if TYPE_CHECKING:
    import numpy as np

    from mobilenet_jax.data.transforms import EvalTransform
    from mobilenet_jax.models.network import MobileNet


class Answer(NamedTuple):
    """A class that an image may be of."""

    name: str  # the class's number where the weights know no names
    probability: float
    index: int


class Prediction(NamedTuple):
    """What the network says of an image, or why there is nothing to say."""

    path: Path
    answers: list[Answer]  # the most probable first; none where there is an error
    error: str | None


def predict(
    weights: tuple["MobileNet", dict, dict],
    images: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """The most probable classes of images, one prediction each, in order; the network's preprocessing is the card's.

    Args:
      weights: (model, variables, card) of `load_weights`.
      images: files, and folders for what `list_images` finds in them.
      top: answers an image; as many as there are classes at most.
      batch_size: images computed at once. The last batch is filled up: one program is compiled.

    Raises:
      ValueError: an impossible value, a folder without images, or weights without classes; before any image is read.
    """
    from mobilenet_jax.data.transforms import EvalTransform
    from mobilenet_jax.models.cost import compute_cost
    from mobilenet_jax.weights.card import read_preprocessing

    model, _, card = weights
    for key, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{key} is {value}; valid: 1 or more")
    if not model.spec.num_classes:
        raise ValueError(f"the weights {card['name']} have no classifier, and so no classes")
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    compute_cost(model.spec, given.image_size)  # says so if the image is too small
    files = list_images(images)
    transform = EvalTransform(given.image_size, given.crop_share, given.interpolation, given.squash)
    run = _compile(model, given.mean, given.std, top=min(top, model.spec.num_classes))
    return _predict(run, weights, files, transform=transform, batch_size=min(batch_size, len(files)))


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """`paths` with every folder replaced by the images in it, at any depth, in the order of their names.

    Images are what data sets of folders have: .jpg, .jpeg, .png, .webp; a path that is no folder is taken as it is.
    Links to folders are not followed. Raises ValueError for a folder without images, OSError for one that cannot be
    read.
    """
    from mobilenet_jax.data.sources import SUFFIXES, is_image

    def refuse(error: OSError):
        raise error

    files = []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            files.append(path)
            continue
        before = len(files)
        for folder, subfolders, names in os.walk(path, onerror=refuse):
            subfolders.sort()
            files += [file for file in map(Path(folder).joinpath, sorted(names)) if is_image(file)]
        if len(files) == before:
            raise ValueError(f"{path} holds no image; valid: files ending in {', '.join(SUFFIXES)}")
    if not files:
        raise ValueError("there are no images; give files or folders")
    return files


def _compile(model: "MobileNet", mean: tuple[float, ...], std: tuple[float, ...], *, top: int):
    """(variables, images uint8 [B, S, S, 3]) -> (probabilities [B, top], classes [B, top]), one program."""
    import jax

    from mobilenet_jax.training.steps import normalise_images

    @jax.jit
    def run(variables: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(variables, normalise_images(images, mean, std), train=False)
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), top)
        return probabilities, classes

    return run


def _predict(
    run, weights: tuple, files: list[Path], *, transform: "EvalTransform", batch_size: int
) -> Iterator[Prediction]:
    import jax

    _, variables, card = weights
    variables, running = jax.device_put(variables), None
    # A batch is read while the device computes the one before.
    for paths, errors, images in read_batches(files, transform, batch_size=batch_size):
        following = paths, errors, run(variables, images)
        if running:
            yield from _name(*running, card["class_names"])
        running = following
    if running:
        yield from _name(*running, card["class_names"])


def read_batches(
    files: list[Path], transform: "EvalTransform", *, batch_size: int
) -> Iterator[tuple[list[Path], list[str | None], "np.ndarray"]]:
    """(files, why each cannot be read or None, images uint8 [batch_size, S, S, 3]): black where there is no image."""
    import numpy as np

    size = transform.image_size
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), batch_size):
            paths = files[start : start + batch_size]
            images = np.zeros((batch_size, size, size, 3), np.uint8)
            errors = list(pool.map(functools.partial(_read, transform=transform), paths, images))
            yield paths, errors, images


def _read(path: Path, row: "np.ndarray", *, transform: "EvalTransform") -> str | None:
    """Fill a row of a batch; return why it cannot be."""
    from mobilenet_jax.data.decode import UnreadableImageError, decode_image

    try:
        row[:] = transform(decode_image(path, name=str(path)))
    except UnreadableImageError as error:
        return " ".join(str(error).splitlines())
    return None


def _name(paths: list[Path], errors: list[str | None], scores, class_names: list[str] | None) -> Iterator[Prediction]:
    import numpy as np

    probabilities, classes = map(np.asarray, scores)
    for i, (path, error) in enumerate(zip(paths, errors, strict=True)):
        if error is None and not np.isfinite(probabilities[i]).all():
            error = f"{path}: the network's answer is not finite"
        pairs = zip(probabilities[i].tolist(), classes[i].tolist(), strict=True) if error is None else ()
        yield Prediction(path, [Answer(class_names[k] if class_names else str(k), p, k) for p, k in pairs], error)


# The command.

_COLUMNS = ("class", "probability", "index")  # what an `Answer` is called in JSON and CSV


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; argparse ends the program where they cannot be understood."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.predict", description="What is on images: class names and probabilities."
    )
    parser.add_argument("images", nargs="+", help="image files, and folders of them at any depth")
    parser.add_argument(
        "--weights",
        required=True,
        help="a .pth, .safetensors, .h5 or .keras file, the workdir of a run, or a name: torchvision/mobilenet_v2, "
        "keras/MobileNetV2, hf:timm/mobilenetv2_100.ra_in1k",
    )
    parser.add_argument(
        "--name", help="the model in the weights, as timm/tf_mobilenetv3_large_100, where it is asked for"
    )
    parser.add_argument("--offline", action="store_true", help="take what was downloaded before, no network")
    parser.add_argument("--top", type=int, default=5, help="classes an image; default: %(default)s")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json", action="store_true", help="a JSON array with one image a line")
    kinds.add_argument("--csv", action="store_true", help="columns path, rank, class, probability, index")
    parser.add_argument("--batch_size", type=int, default=32, help="images computed at once; default: %(default)s")
    add_cache_flag(parser)
    return parser.parse_args(argv)


def _format_text(prediction: Prediction, rank: int, count: int) -> str:
    answers = [f"\n{answer.probability:>9.2%}  {answer.name}" for answer in prediction.answers]
    return f"{prediction.path}{''.join(answers)}" if answers else ""


def _format_json(prediction: Prediction, rank: int, count: int) -> str:
    """Lines that are one array together."""
    path, answers, error = prediction
    shown = {"error": error} if error else {"classes": [dict(zip(_COLUMNS, answer, strict=True)) for answer in answers]}
    opening, closing = "[" if rank == 0 else " ", "]" if rank == count - 1 else ","
    return f"{opening}{json.dumps({'path': str(path), **shown})}{closing}"


def _format_csv(prediction: Prediction, rank: int, count: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rank == 0:
        writer.writerow(("path", "rank", *_COLUMNS))
    for i, answer in enumerate(prediction.answers, start=1):
        writer.writerow((prediction.path, i, *answer))
    return text.getvalue().removesuffix("\n")


def _show(predictions: Iterator[Prediction], count: int, flags: argparse.Namespace) -> int:
    """Print predictions as they come, errors and progress on stderr; return the number of errors."""
    from tqdm import tqdm

    from mobilenet_jax.training.progress import Progress

    failed, form = 0, _format_json if flags.json else _format_csv if flags.csv else _format_text
    with Progress(count, steps_per_epoch=None, batch_size=1, active=count > flags.batch_size) as progress:
        for i, prediction in enumerate(predictions):
            if prediction.error:
                failed += 1
                tqdm.write(prediction.error, file=sys.stderr)
            if text := form(prediction, i, count):
                tqdm.write(text, file=sys.stdout)
            progress.update(i + 1, {})
    sys.stdout.flush()
    return failed


def run(flags: argparse.Namespace) -> int:
    """Predict; return the exit code."""
    from mobilenet_jax.weights.load import load_weights

    configure_memory(flags.compilation_cache)
    try:
        files = list_images(flags.images)
        weights = load_weights(flags.weights, flags.name, offline=flags.offline)
        predictions = predict(weights, files, top=flags.top, batch_size=flags.batch_size)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return int(_show(predictions, len(files), flags) > 0)


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, 1 where an image failed, 2 for a command that cannot be obeyed."""
    flags = parse(argv)
    show_own_messages()
    # Pillow's, of metadata that nothing here reads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are any bytes
    return get_exit_code(lambda: run(flags))


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
