"""The state that a run starts from: restored from a checkpoint, initialised from weights, or fresh."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.training.build import Setup
from mobilenet_jax.training.config import warn_of_other_preprocessing
from mobilenet_jax.training.quantized import init_ranges
from mobilenet_jax.training.sharding import replicate
from mobilenet_jax.training.steps import TrainState, create_state
from mobilenet_jax.workdir.checkpoint import merge_variables


@dataclass(frozen=True, kw_only=True)
class Start:
    """A training state on all devices, and what the host had accumulated when it was saved."""

    state: TrainState
    step: int  # steps done so far
    means: dict  # of `Mean.state`: the sums of the steps since the last line of metrics
    skipped: int  # unreadable images passed over so far
    seconds: float  # that it took to make the state


def make_start(setup: Setup, restore: Callable[[Any], tuple[TrainState, dict] | None]) -> Start:
    """Return the state that `restore` finds, otherwise an initial state.

    `restore` takes the structure of the state and returns (state, meta), or None if there is no checkpoint.

    Raises:
      ValueError, OSError: a checkpoint or weights that do not fit the config, in one sentence.
    """
    began = time.perf_counter()
    config = setup.config
    variables = init_variables(setup.model, seed=config.seed)
    create = functools.partial(create_state, optimizer=setup.optimizer, ema=config.ema.decay > 0)
    ranges = {} if config.train.quantize is None else {"ranges": init_ranges(setup.model.spec, config.data.image_size)}
    restored = restore(jax.eval_shape(create, {**variables, **ranges}))
    if restored is None and config.init:
        variables = fill_from_weights(setup, variables)
    state, meta = restored or (jax.jit(create)({**variables, **ranges}), {"train": {}, "skipped": 0})
    return Start(
        state=replicate(state, setup.mesh),
        step=int(state.step),
        means=meta["train"],
        skipped=meta["skipped"],
        seconds=time.perf_counter() - began,
    )


def fill_from_weights(setup: Setup, variables: dict) -> dict:
    """Return the variables with the values of config.init.

    Raises ValueError if the weights were trained with another padding or another epsilon than the model has.
    """
    config = setup.config
    source, loaded, card = setup.load_init()
    theirs, ours = source.spec, setup.model.spec
    if (theirs.padding, theirs.bn_epsilon) != (ours.padding, ours.bn_epsilon):
        raise ValueError(
            f"init {config.init!r} has padding {theirs.padding} and bn_epsilon {theirs.bn_epsilon}, the model "
            f"{ours.padding} and {ours.bn_epsilon}; set model.convention to {card['convention']}"
        )
    warn_of_other_preprocessing(config, card)
    afresh = ("head", "hidden") if config.init_classifier == "drop" else ()
    return merge_variables(variables, loaded, source=config.init, afresh=afresh)
