"""The report of a diagnosis: plain data, findings in words, and a table.

The report is JSON of schema 1:

    schema         1; keys may be added, but none changes its meaning
    weights        {"name", "model", "width", "convention", "source": {"file", "sha256"}} of the card
    images         {"source", "count"}, or null if only the weights were measured
    dead_below     a filter is called dead if its norm over the layer's usual norm is below this
    findings       sentences that name the worst layers
    layers         one object for each layer, in the order in which they run:
      path, kind, activation, channels      kind: depthwise, pointwise, full, dense
      dead_filters   [{"channel", "relative_norm", "cause": "kernel" | "scale" | "both"}]
      norm           {"epsilon", "smallest_variance", "below_epsilon": channels, "smallest_shrink"}, or null
      int8           {"range_ratio", "sqnr_db": {"per_tensor", "per_channel"}, "channel_sqnr_db": the same two keys,
                     "lost_channels": channels}, of weights with the batch norm folded in
      kernel_rank    {"effective_rank", "participation_ratio"} of pointwise and dense kernels, otherwise null
      activations    null without images, or if the activation has no plateau; otherwise
                     {"floor_share": share of outputs at 0,
                     "ceiling_share": share of outputs at 6, null if the activation has no ceiling,
                     "dead_channels": channels that are 0 in every pixel,
                     "saturated_channels": channels that are 6 in every pixel,
                     "active_units": null except for 1x1 convolutions, then {"needed", "mean",
                     "fewest": the smallest number in a pixel, "lost_pixels": share of pixels with fewer than needed}}
    bottlenecks    null, or [{"row", "channels", "effective_rank", "participation_ratio"}] of the covariance of each
                   block's outputs over all pixels
    quantisation   null, or {"per_tensor", "per_channel"}: {"agreement": share of images that the float network and the
                   network of int8 weights put into the same class, "kl": mean KL divergence between their answers, in
                   nats}; activations are not quantised
    grad_norm      null, or {"steps", "norms", "median", "largest", "largest_step", "last"} from the log of the run
"""

from collections.abc import Callable, Sequence

from mobilenet_jax.diagnosis.activations import Tally
from mobilenet_jax.diagnosis.measures import summarise_gradient_norms
from mobilenet_jax.diagnosis.weights import measure_layer
from mobilenet_jax.models.folded import list_layers
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.dead_filters import DEAD

SCHEMA = 1


def make_report(weights: tuple, *, tally: Tally | None = None, images: str = "", metrics: Sequence[dict] = ()) -> dict:
    """Make the report.

    Args:
      weights: (model, variables, card) of `load_weights`.
      tally: the result of `measure_activations`; without it the report is on the weights alone.
      images: the name of the measured images.
      metrics: lines of metrics.jsonl, if the weights are from a run.
    """
    model, variables, card = weights
    spec: Spec = model.spec
    layers = list(list_layers(spec, variables))
    found, bottlenecks, quantisation = {}, None, None
    if tally:
        found, bottlenecks, quantisation = tally.summarise({layer.path: layer.op for layer in layers})
    report = {
        "schema": SCHEMA,
        "weights": {key: card[key] for key in ("name", "model", "width", "convention", "source")},
        "images": {"source": images, "count": tally.images} if tally else None,
        "dead_below": DEAD,
        "findings": [],
        "layers": [measure_layer(layer, spec.bn_epsilon) | {"activations": found.get(layer.path)} for layer in layers],
        "bottlenecks": bottlenecks,
        "quantisation": quantisation,
        "grad_norm": summarise_gradient_norms(list(metrics)),
    }
    report["findings"] = list_findings(report)
    return report


def list_findings(report: dict) -> list[str]:
    """Return one sentence on each subject of a report, without the subjects on which it has nothing."""
    return [sentence for find in _FINDINGS if (sentence := find(report))]


# Findings: each function returns one sentence on the report, or "" if the report has nothing on its subject.


def _list_worst(layers: list[dict], count: Callable[[dict], int], limit: int = 3) -> str:
    """Name the layers with the largest share of counted channels: "block_01/depthwise 4 of 96, ..."."""
    worst = sorted((layer for layer in layers if count(layer)), key=lambda layer: -count(layer) / layer["channels"])
    shown = [f"{layer['path']} {count(layer)} of {layer['channels']}" for layer in worst[:limit]]
    return ", ".join(shown) + (f", and {len(worst) - limit} more layers" if len(worst) > limit else "")


def _find_dead_filters(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["kind"] == "depthwise"]
    count = lambda layer: len(layer["dead_filters"])  # noqa: E731
    dead, filters = sum(map(count, layers)), sum(layer["channels"] for layer in layers)
    if not dead:
        return f"No depthwise filter is dead: each of the {filters:,} has over {DEAD:.0%} of its layer's usual norm."
    causes = [found["cause"] for layer in layers for found in layer["dead_filters"]]
    return (
        f"{dead:,} of {filters:,} depthwise filters are dead, below {DEAD:.0%} of their layer's usual norm "
        f"({causes.count('kernel')} by their weights, {causes.count('scale')} by the batch norm's scale, "
        f"{causes.count('both')} by both): {_list_worst(layers, count)}."
    )


def _find_other_dead_filters(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["kind"] != "depthwise"]
    count = lambda layer: len(layer["dead_filters"])  # noqa: E731
    dead = sum(map(count, layers))
    return f"{dead:,} filters of other layers are dead too: {_list_worst(layers, count)}." if dead else ""


def _find_small_variances(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["norm"]]
    count = lambda layer: len(layer["norm"]["below_epsilon"])  # noqa: E731
    small, epsilon = sum(map(count, layers)), layers[0]["norm"]["epsilon"]
    if not small:
        return f"No batch-norm variance is below epsilon ({epsilon:g})."
    least = min(layers, key=lambda layer: layer["norm"]["smallest_variance"])
    return (
        f"{small:,} batch-norm variances are below epsilon ({epsilon:g}), so that epsilon sets these channels' scale: "
        f"{_list_worst(layers, count)}. The smallest is {least['norm']['smallest_variance']:.1e} in {least['path']}; "
        f"that channel keeps {least['norm']['smallest_shrink']:.2g} of its scale."
    )


def _find_dead_activations(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["activations"]]
    if not layers:
        return ""
    count = lambda layer: len(layer["activations"]["dead_channels"])  # noqa: E731
    emptiest = max(layers, key=lambda layer: layer["activations"]["floor_share"])
    text = f"Zeros: most in {emptiest['path']}, {emptiest['activations']['floor_share']:.1%} of its outputs"
    if not (dead := sum(map(count, layers))):
        return f"{text}; no channel is 0 everywhere."
    return f"{text}; {dead:,} channels are 0 in every pixel of the images: {_list_worst(layers, count)}."


def _find_saturation(report: dict) -> str:
    layers = [
        layer
        for layer in report["layers"]
        if layer["activations"] and layer["activations"]["ceiling_share"] is not None
    ]
    if not layers:
        return ""
    fullest = max(layers, key=lambda layer: layer["activations"]["ceiling_share"])
    always = sum(len(layer["activations"]["saturated_channels"]) for layer in layers)
    text = f"Saturation at 6: most in {fullest['path']}, {fullest['activations']['ceiling_share']:.1%} of its outputs"
    return f"{text}; {always:,} channels are 6 in every pixel." if always else f"{text}; no channel is 6 everywhere."


def _find_lost_pixels(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["activations"] and layer["activations"]["active_units"]]
    if not layers:
        return ""
    lost = lambda layer: layer["activations"]["active_units"]["lost_pixels"]  # noqa: E731
    worst = sorted(filter(lost, layers), key=lost, reverse=True)
    if not worst:
        return (
            "Every pixel has at least as many active units after each 1x1 convolution as there are dimensions to keep."
        )
    shown = ", ".join(f"{layer['path']} at {100 * lost(layer):.3g}% of the pixels" for layer in worst[:3])
    more = f", and {len(worst) - 3} more layers" if len(worst) > 3 else ""
    return f"Fewer active units than dimensions, so that the input cannot be recovered: {shown}{more}."


def _find_low_rank(report: dict) -> str:
    if not report["bottlenecks"]:
        return ""
    worst = sorted(report["bottlenecks"], key=lambda found: found["effective_rank"] / found["channels"])[:3]
    shown = ", ".join(f"{found['row']} {found['effective_rank']:.1f} of {found['channels']}" for found in worst)
    return f"Blocks whose outputs use the fewest dimensions (effective rank): {shown}."


def _find_int8_risk(report: dict) -> str:
    layers = [layer for layer in report["layers"] if layer["kind"] != "dense"]
    decibels = lambda layer: layer["int8"]["channel_sqnr_db"]  # noqa: E731
    worst = sorted(layers, key=lambda layer: decibels(layer)["per_tensor"])[:3]
    shown = ", ".join(
        f"{layer['path']} {decibels(layer)['per_tensor']:.0f} dB (one scale per channel: "
        f"{decibels(layer)['per_channel']:.0f})"
        for layer in worst
    )
    lost = sum(len(layer["int8"]["lost_channels"]) for layer in report["layers"])
    text = f"int8 weights with one scale per layer, worst: {shown}; {lost:,} living channels round to 0."
    if answers := report["quantisation"]:
        for kind, start in (("per_tensor", " With one scale per layer"), ("per_channel", "; with one per channel")):
            found = answers[kind]
            text += f"{start} {found['agreement']:.1%} of the images keep their class (KL {found['kl']:.2g} nats)"
        text += "."
    return text


def _find_gradient_norms(report: dict) -> str:
    norms = report["grad_norm"]
    if not norms:
        return ""
    return (
        f"Gradient norm over training: median {norms['median']:.3g}, largest {norms['largest']:.3g} at step "
        f"{norms['largest_step']:,}, last {norms['last']:.3g}."
    )


_FINDINGS = (
    _find_dead_filters,
    _find_other_dead_filters,
    _find_dead_activations,
    _find_saturation,
    _find_lost_pixels,
    _find_low_rank,
    _find_small_variances,
    _find_int8_risk,
    _find_gradient_norms,
)


def format_text(report: dict) -> str:
    """Format the findings, then a table with one line per layer; a dash means that there is nothing to measure."""
    weights, images = report["weights"], report["images"]
    seen = f"{images['count']:,} images of {images['source']}" if images else "weights alone (no images given)"
    lines = [f"{weights['name']}, {weights['source']['file']}: {seen}", ""]
    lines += [f"- {sentence}" for sentence in report["findings"]]
    header = ("layer", "channels", "dead", "var<eps", "at 0", "at 6", "always 0", "lost px", "rank", "int8 dB", "lost")
    ranks = {found["row"]: found for found in report["bottlenecks"] or ()}
    rows = [header, *(_format_row(layer, ranks) for layer in report["layers"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines.append("")
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines += ["", _LEGEND]
    return "\n".join(lines)


_LEGEND = """\
dead: filters; var<eps: batch-norm variances below epsilon; at 0, at 6: shares of the outputs; always 0: channels;
lost px: pixels with fewer active units than dimensions; rank: effective rank of the block's output, in the row of its
last layer; int8 dB: weights' SQNR, mean over channels, with one scale per layer / per channel; lost: channels that
round to 0"""


def _format_row(layer: dict, ranks: dict[str, dict]) -> tuple[str, ...]:
    seen, block = layer["activations"], layer["path"].split("/")[0]
    is_last = layer["path"].endswith(("project", "pointwise"))
    units = seen["active_units"] if seen else None
    int8 = layer["int8"]["channel_sqnr_db"]
    share = lambda value: "-" if value is None else f"{value:.1%}"  # noqa: E731
    return (
        layer["path"],
        str(layer["channels"]),
        str(len(layer["dead_filters"])),
        str(len(layer["norm"]["below_epsilon"])) if layer["norm"] else "-",
        share(seen["floor_share"] if seen else None),
        share(seen["ceiling_share"] if seen else None),
        str(len(seen["dead_channels"])) if seen else "-",
        share(units["lost_pixels"] if units else None),
        f"{ranks[block]['effective_rank']:.1f}" if is_last and block in ranks else "-",
        f"{int8['per_tensor']:.0f}/{int8['per_channel']:.0f}",
        str(len(layer["int8"]["lost_channels"])),
    )
