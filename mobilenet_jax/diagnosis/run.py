"""From weights and images to a report, and to the files of a report."""

from collections.abc import Sequence
from pathlib import Path

from mobilenet_jax.diagnosis.activations import Tally, measure_activations
from mobilenet_jax.diagnosis.images import Images, open_evaluation_set, open_files
from mobilenet_jax.diagnosis.page import draw_page
from mobilenet_jax.diagnosis.report import make_report
from mobilenet_jax.diagnosis.weights import quantise_variables
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.paths import as_path
from mobilenet_jax.training.progress import Progress
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.files import write_json_atomic
from mobilenet_jax.workdir.metrics import METRICS_FILE, read_metrics


def diagnose(
    source: str,
    name: str | None = None,
    *,
    offline: bool = False,
    select: str | None = None,
    data: Sequence[str] = (),
    config: str | None = None,
    overrides: Sequence[str] = (),
    batch_size: int = 32,
    out: str | None = None,
) -> dict:
    """Return the report on weights; write diagnosis.json and diagnosis.png into the folder `out`, if there is one.

    Args:
      source: a file of weights, the workdir of a run, or the name of published weights.
      name: the model in the weights, if they do not say it themselves.
      offline: use earlier downloads only.
      select: which network of a checkpoint with several.
      data: image files and folders; measured are these images.
      config: a config file; measured is its evaluation set. With neither the report is on the weights alone.
      overrides: of the config, as --config.KEY=VALUE.
      batch_size: images computed at once.
      out: the folder of the two files.

    Raises:
      UnreadableImageError: an image cannot be read.
      ValueError, OSError: an argument that cannot be used.
    """
    weights = load_weights(source, name, offline=offline, select=select)
    model, variables, card = weights
    images = None
    if config:
        images = open_evaluation_set(config, list(overrides), card, batch_size=batch_size)
    elif data:
        images = open_files(data, card, batch_size=batch_size)
    tally = _measure(model, variables, images, batch_size=batch_size) if images else None
    workdir = as_path(source)
    metrics = read_metrics(workdir) if (workdir / METRICS_FILE).exists() else ()
    report = make_report(weights, tally=tally, images=images.source if images else "", metrics=metrics)
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "diagnosis.json", report)
        draw_page(report, list(list_layers(model.spec, variables)), folder / "diagnosis.png")
    return report


def _measure(model, variables: dict, images: Images, *, batch_size: int) -> Tally:
    compute_cost(model.spec, images.size)  # raises ValueError if the images are too small for the network
    kinds = {"per_tensor": False, "per_channel": True}
    quantised = {k: quantise_variables(model.spec, variables, per_channel=v) for k, v in kinds.items()}
    active = images.count > batch_size
    with Progress(images.count, steps_per_epoch=None, batch_size=1, active=active) as progress:
        return measure_activations(
            model,
            variables,
            images.batches,
            mean=images.mean,
            std=images.std,
            quantised=quantised,
            report=lambda done: progress.update(done, {}),
        )
