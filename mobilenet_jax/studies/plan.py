"""The plan of a study: the cost of each variant, and an estimate of the time of the remaining runs."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mobilenet_jax.models.cost import Cost
from mobilenet_jax.studies.records import check_record, find_runs, read_record
from mobilenet_jax.studies.sharing import find_finished
from mobilenet_jax.studies.study import RunKey, Study
from mobilenet_jax.training.plan import make_plan as make_run_plan

if TYPE_CHECKING:  # NumPy is imported when the data is opened
    from mobilenet_jax.data.sources import DataInfo

# What a run costs on two cores. The first three are a fit to the images/s of V1 and V2 at 9 widths and 6 sizes, between
# 0.69 and 1.33 of the measured times (docs/performance.md, docs/studies); START and COMPILATION are from
# docs/performance.md, with the program of the evaluation.
SECONDS_OF_MADD = 1 / 32e9  # training: forward and backward pass
SECONDS_OF_ELEMENT = 1 / 1.1e9  # training: an activation that is kept for the backward pass
SECONDS_OF_IMAGE = 1 / 4000  # training: reading and augmenting
EVALUATION = 1 / 3  # of the time of training on an image: the forward pass alone
START = 5.0  # seconds of a run: data, initial state, tracing, loading compiled programs, figures
COMPILATION = 0.4  # seconds for a layer, in the first run of a variant


class Work(NamedTuple):
    """The estimated seconds of a run."""

    run: float  # with compiled programs
    compilation: float  # of these programs


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
    config, info, missing = study.config, None, ""
    try:
        info = describe(config.data)
    except (ValueError, OSError) as error:
        if needs_data or config.model.num_classes is None:
            raise
        missing = str(error)
    num_classes = info.num_classes if info else config.model.num_classes
    costs = {variant: study.compute_cost(variant, num_classes) for variant in study.variants}
    records = {key: read_record(key.folder(workdir)) for key in known}
    done = {key: r["seconds"] for key, r in records.items() if r is not None and r["status"] == "finished"}
    shared = {key for key in runs if records[key] is None and find_finished(study, key, workdir)}
    left = [key for key in runs if key not in shared and ((r := records[key]) is None or r["status"] == "started")]
    length = f"time: not known without the data ({missing})"
    if info is not None:
        work = {key: estimate_work(study.make_config(key), costs[key.variant], info) for key in {*left, *done}}
        length = estimate_time(work, left, done)
    head = f"{study.name} on {config.data.source}: {len(runs)} runs, {len(left)} to do"
    head += f", {len(shared)} finished in other studies" if shared else ""
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


def estimate_work(config, cost: Cost, data: "DataInfo") -> Work:
    """Estimate the time of a run from the arithmetic of its network and the number of images it sees."""
    plan = make_run_plan(config, data.train_count)
    image = cost.madds * SECONDS_OF_MADD + cost.training_elements * SECONDS_OF_ELEMENT
    kinds = 2 if config.ema.decay > 0 else 1  # the variables and their averages are evaluated
    evaluated = kinds * data.eval_count * math.ceil(plan.total_steps / plan.eval_every)
    measured = plan.stats_batches * config.data.batch_size  # images for the batch-norm statistics
    training = plan.total_steps * config.data.batch_size * (image + SECONDS_OF_IMAGE)
    return Work(START + training + (evaluated + measured) * EVALUATION * image, COMPILATION * len(cost.ops))


def estimate_time(work: Mapping[RunKey, Work], left: Sequence[RunKey], done: Mapping[RunKey, float]) -> str:
    """Say in a sentence how long the remaining runs will take.

    A run takes the mean time of the finished runs of its variant. If there are none, its estimated time is multiplied
    by the ratio of measured and estimated time of all finished runs. The first run of a variant compiles.

    Args:
      work: the estimate of each run.
      left: the remaining runs.
      done: seconds of each finished run.
    """
    if not left:
        return "nothing is left to do"
    ratio = sum(done.values()) / _sum_work(work, done) if done else 1.0
    seen = {key.variant for key in done}
    seconds = ratio * _sum_work(work, [key for key in left if key.variant not in seen])
    for key in left:
        same = [value for other, value in done.items() if other.variant == key.variant]
        seconds += sum(same) / len(same) if same else 0.0
    by = f"from {len(done)} finished runs" if done else "for two cores, with start, compilation and evaluation"
    return f"time: about {_format_seconds(seconds)}, estimated {by}"


def _sum_work(work: Mapping[RunKey, Work], keys: Collection[RunKey]) -> float:
    """Add up the time of runs, of which the first of each variant compiles."""
    first = {key.variant: work[key].compilation for key in keys}
    return sum(work[key].run for key in keys) + sum(first.values())


def _format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
