"""The lengths of a run in steps, derived once from epochs, images and batch size."""

import math
from dataclasses import dataclass

from absl import logging


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When a run logs, evaluates, saves and ends."""

    total_steps: int
    steps_per_epoch: float
    eval_every: int
    save_every: int
    log_every: int
    freeze_steps: int  # steps before the parameters of optim.freeze are trained too
    stats_batches: int  # batches over which batch-norm statistics are measured at the end
    range_steps: int  # steps in which the ranges of int8 move

    def begins_phase(self, step: int) -> bool:
        """Return whether `step` is the first that trains other things than the step before it."""
        return step in (self.freeze_steps + 1, self.range_steps + 1)

    def is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens every `every` steps, and at the end, happens after `step`."""
        return step == self.total_steps or step % every == 0


def make_plan(config, train_count: int) -> Plan:
    """Return the plan of a run over `train_count` images. Raises ValueError for more steps than int32 counts."""
    train = config.train
    per_epoch = train_count / config.data.batch_size
    total = train.steps if train.steps is not None else math.ceil(train.epochs * per_epoch)
    if total >= 2**31:
        raise ValueError(f"train.epochs is {train.epochs}, which is {total:,} steps; valid: up to {2**31 - 1:,} steps")

    def every(epochs: float) -> int:
        return max(1, round(epochs * per_epoch)) if epochs else total

    return Plan(
        total_steps=total,
        steps_per_epoch=per_epoch,
        eval_every=every(train.eval_every_epochs),
        save_every=every(train.save_every_epochs),
        log_every=train.log_every_steps,
        freeze_steps=total if config.optim.freeze_epochs is None else round(config.optim.freeze_epochs * per_epoch),
        stats_batches=math.ceil(train.recompute_stats_epochs * per_epoch),
        range_steps=total if train.quantize is None else max(0, total - round(train.freeze_ranges_epochs * per_epoch)),
    )


def warn_of_short_run(config, plan: Plan, train_count: int) -> None:
    """Log a warning for a batch larger than the training set, and for averages longer than the run.

    The schedule warns of a warm-up that outlasts the run.
    """
    if config.data.batch_size > train_count:
        logging.warning(
            "data.batch_size = %d is larger than the training set of %d images: each batch has images more than once",
            config.data.batch_size,
            train_count,
        )
    if config.train.quantize is None and not config.train.freeze_stats and not plan.stats_batches:
        warn_of_slow_statistics(config.model.bn_decay, plan.total_steps)
    decay, steps = config.ema.decay, plan.total_steps
    ramp = (1 + steps) / (10 + steps)  # of `ema.update_ema`
    if steps * (1 - decay) < 1:
        logging.warning(
            "ema.decay = %g averages over about %d steps, and the run has %d: the average is over the last %d",
            decay,
            round(1 / (1 - decay)),
            steps,
            round(1 / (1 - ramp)),
        )


def warn_of_slow_statistics(bn_decay: float, total_steps: int) -> None:
    """Log a warning if over 5% of the initial batch-norm statistics would be left at the end of the run."""
    left = bn_decay**total_steps
    if left > 0.05:
        fitting = math.floor(0.01 ** (1 / total_steps) * 1000) / 1000
        logging.warning(
            "model.bn_decay = %g leaves %.0f%% of the initial statistics in the running statistics after %d steps; "
            "%g leaves 1%%, train.recompute_stats_epochs = 1 measures them at the end",
            bn_decay,
            100 * left,
            total_steps,
            fitting,
        )
