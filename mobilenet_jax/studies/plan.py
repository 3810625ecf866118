"""The plan of a study: the cost of each variant, and an estimate of the time of the remaining runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mobilenet_jax.models.cost import Cost
from mobilenet_jax.studies.records import check_record, find_runs, read_record
from mobilenet_jax.studies.study import RunKey, Study

RATE = 15e9  # multiply-adds of training a second on two cores; the backward pass counts twice the forward pass


class Plan(NamedTuple):
    """The text of a plan, and the number of classes of its networks."""

    text: str
    num_classes: int


def make_plan(study: Study, workdir: Path, runs: Sequence[RunKey], *, needs_data: bool) -> Plan:
    """Make the plan of `runs`; runs that finished in the workdir inform the estimate of the time.

    Raises ValueError or OSError if a run was started with another config and, if `needs_data`, if the data set cannot
    be opened.
    """
    from mobilenet_jax.data.sources import describe

    known = dict.fromkeys((*runs, *find_runs(study, workdir)))
    for key in known:
        check_record(study, key, workdir)
    config, missing = study.config, ""
    try:
        info = describe(config.data)
        num_classes, images = info.num_classes, info.train_count
    except (ValueError, OSError) as error:
        if needs_data or config.model.num_classes is None:
            raise
        num_classes, images, missing = config.model.num_classes, None, str(error)
    costs = {variant: study.compute_cost(variant, num_classes) for variant in study.variants}
    records = {key: read_record(key.folder(workdir)) for key in known}
    done = {key: r["seconds"] for key, r in records.items() if r is not None and r["status"] == "finished"}
    left = [key for key in runs if (record := records[key]) is None or record["status"] == "started"]
    length = f"time: not known without the data ({missing})"
    if images is not None:
        work = {key: _count_work(study, key, costs[key.variant].madds, images) for key in {*left, *done}}
        length = estimate_time(work, left, done)
    head = f"{study.name} on {config.data.source}: {len(runs)} runs, {len(left)} to do"
    table = format_costs(study, {key.variant: costs[key.variant] for key in runs})
    return Plan(f"{head}\n\n{table}\n\n{length}", num_classes)


def format_costs(study: Study, costs: Mapping[str, Cost]) -> str:
    """Format one line for each variant: parameters, multiply-adds, and its changes to the base."""
    lines = [["variant", "parameters", "multiply-adds", "changes"]]
    for variant, cost in costs.items():
        changes = ", ".join(f"{key}={value}" for key, value in study.variants[variant].items()) or "none"
        name = f"{variant} (base)" if variant == study.baseline else variant
        lines.append([name, f"{cost.params:,}", f"{cost.madds:,}", changes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in lines)


def _count_work(study: Study, key: RunKey, madds: int, images: int) -> float:
    """Count the multiply-adds of a training run; the backward pass counts twice the forward pass."""
    config = study.make_config(key)
    seen = images * config.train.epochs if config.train.steps is None else config.train.steps * config.data.batch_size
    return 3 * madds * seen


def estimate_time(work: Mapping[RunKey, float], left: Sequence[RunKey], done: Mapping[RunKey, float]) -> str:
    """Say in a sentence how long the remaining runs will take.

    A run takes the mean time of the finished runs of its variant. If there are none, its work is divided by the rate of
    all finished runs, or by RATE if no run has finished.

    Args:
      work: multiply-adds of each run.
      left: the remaining runs.
      done: seconds of each finished run.
    """
    if not left:
        return "nothing is left to do"
    rate = sum(work[key] for key in done) / sum(done.values()) if sum(done.values()) else RATE
    seconds = 0.0
    for key in left:
        same = [value for other, value in done.items() if other.variant == key.variant]
        seconds += sum(same) / len(same) if same else work[key] / rate
    by = f"from {len(done)} finished runs" if done else f"at {RATE / 1e9:g} G multiply-adds of training a second"
    return f"time: about {_format_seconds(seconds)}, estimated {by}"


def _format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
