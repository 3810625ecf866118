"""Lengths of a run in steps."""

import math
from dataclasses import dataclass

from absl import logging


@dataclass(frozen=True)
class Plan:
    """Lengths in steps, derived once from epochs, images and batch size."""

    total_steps: int
    steps_per_epoch: float
    eval_every: int
    save_every: int
    log_every: int
    freeze_steps: int  # that optim.freeze lasts
    stats_batches: int  # that statistics are measured over at the end

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps, and at the end, is done after `step`."""
        return step == self.total_steps or step % every == 0


def make_plan(config, train_count: int) -> Plan:
    """The plan of a run over `train_count` images."""
    train = config.train
    per_epoch = train_count / config.data.batch_size
    total = train.steps if train.steps is not None else math.ceil(train.epochs * per_epoch)

    def every(epochs: float) -> int:
        return max(1, round(epochs * per_epoch)) if epochs else total

    return Plan(
        total,
        per_epoch,
        every(train.eval_every_epochs),
        every(train.save_every_epochs),
        train.log_every_steps,
        total if config.optim.freeze_epochs is None else round(config.optim.freeze_epochs * per_epoch),
        math.ceil(train.recompute_stats_epochs * per_epoch),
    )


def warn_of_slow_statistics(bn_decay: float, total_steps: int) -> None:
    """Say so when over 5% of the initial batch-norm statistics would be left in the running ones at the run's end."""
    left = bn_decay**total_steps
    if left > 0.05:
        fitting = math.floor(0.01 ** (1 / total_steps) * 1000) / 1000
        logging.warning(
            "model.bn_decay = %g leaves %.0f%% of the initial statistics in those of evaluation after %d steps; "
            "%g leaves 1%%, train.recompute_stats_epochs = 1 measures them anew",
            bn_decay,
            100 * left,
            total_steps,
            fitting,
        )
