"""Predictions as text, JSON or CSV. A formatter takes a prediction, its rank from 0 on, and the number of all."""

import csv
import io
import json
import sys
from collections.abc import Iterable

from mobilenet_jax.inference.predict import Prediction

_COLUMNS = ("class", "probability", "index")  # the names of an Answer's fields in JSON and CSV


def format_text(prediction: Prediction, rank: int, count: int) -> str:
    """Return the path and a line for each answer; an empty string for an image with an error."""
    del rank, count
    answers = [f"\n{answer.probability:>9.2%}  {answer.name}" for answer in prediction.answers]
    return f"{prediction.path}{''.join(answers)}" if answers else ""


def format_json(prediction: Prediction, rank: int, count: int) -> str:
    """Return one line; all lines together are one JSON array."""
    path, answers, error = prediction
    shown = {"error": error} if error else {"classes": [dict(zip(_COLUMNS, answer, strict=True)) for answer in answers]}
    opening, closing = "[" if rank == 0 else " ", "]" if rank == count - 1 else ","
    return f"{opening}{json.dumps({'path': str(path), **shown})}{closing}"


def format_csv(prediction: Prediction, rank: int, count: int) -> str:
    """Return a row for each answer, after the header if the prediction is the first."""
    del count
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rank == 0:
        writer.writerow(("path", "rank", *_COLUMNS))
    for i, answer in enumerate(prediction.answers, start=1):
        writer.writerow((prediction.path, i, *answer))
    return text.getvalue().removesuffix("\n")


FORMATS = {"text": format_text, "json": format_json, "csv": format_csv}


def print_predictions(predictions: Iterable[Prediction], count: int, *, form: str, progress: bool) -> int:
    """Print predictions as they come, with errors and progress on stderr; return the number of errors.

    `form` is a key of `FORMATS`, `count` the number of predictions.
    """
    from tqdm import tqdm

    from mobilenet_jax.training.progress import Progress

    failed = 0
    with Progress(count, steps_per_epoch=None, batch_size=1, active=progress) as shown:
        for i, prediction in enumerate(predictions):
            if prediction.error:
                failed += 1
                tqdm.write(prediction.error, file=sys.stderr)
            if text := FORMATS[form](prediction, i, count):
                tqdm.write(text, file=sys.stdout)
            shown.update(i + 1, {})
    sys.stdout.flush()
    return failed
