"""Learning-rate schedules and optimizers from `config.optim`, and rules on parameter paths.

Everything is optax underneath. This module adds the arithmetic of the recipes: TensorFlow's RMSProp, a staircase
counted from the first step, and decay by rules on paths.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging


def make_schedule(optim_config, *, batch_size: int, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    The peak is lr_per_256 * batch_size / 256 (the linear rule of 1706.02677). The warm-up is linear from 0 to the value
    of the schedule at the end of the warm-up, so there is no jump (`LinearWarmup` of TensorFlow's official models).

    Args:
      optim_config: `config.optim`.
      batch_size: images a step, over all devices and hosts.
      steps_per_epoch: training images / batch_size; need not be whole.
      total_steps: the step at which the cosine reaches 0.

    Returns:
      A function from a step (int or traced) to a learning rate, float32.
    """
    peak = optim_config.lr_per_256 * batch_size / 256
    warmup = optim_config.warmup_epochs * steps_per_epoch
    if warmup >= total_steps:
        logging.warning("optim.warmup_epochs: the warm-up of %g steps outlasts the %d of the run", warmup, total_steps)
    after = SCHEDULES[optim_config.schedule](optim_config, peak, warmup, steps_per_epoch, total_steps)
    if not warmup:
        return after
    return lambda step: jnp.where(step < warmup, step / warmup * after(warmup), after(step))


def _cosine(_, peak, warmup, __, total_steps) -> optax.Schedule:
    decay = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1))
    return lambda step: decay(step - warmup)


def _staircase(optim_config, peak, _, steps_per_epoch, __) -> optax.Schedule:
    decay_steps = optim_config.decay_epochs * steps_per_epoch
    return optax.exponential_decay(peak, decay_steps, optim_config.decay_factor, staircase=True)


def _constant(_, peak, *__) -> optax.Schedule:
    return optax.constant_schedule(peak)


# Each function takes (config.optim, peak, warm-up steps, steps per epoch, total steps) and returns the schedule after
# the warm-up, as a function of the step since the start of training.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "cosine": _cosine,
    "staircase": _staircase,
    "constant": _constant,
}


def make_optimizer(
    optim_config,
    params,
    *,
    schedule: optax.Schedule,
    frozen=None,
    freeze_steps: int | None = None,
    layers: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Return the optimizer of `config.optim` for these parameters.

    It works in this order. It clips the gradients of what is trained by their global norm. It adds l2 * w, the
    gradient of l2 * sum(w^2) / 2. The optimizer proper makes its update, learning rate included. Weight decay
    subtracts lr * weight_decay * w, as PyTorch's AdamW does, past any momentum. The power of `layer_decay` of the layer
    scales the sum. The factors of `decay_rules` scale both decays. Frozen parameters get an update of exactly 0 and
    have no optimizer state. If they thaw, their state begins at that step, as that of a new optimizer.

    Args:
      optim_config: `config.optim`.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      schedule: from `make_schedule`.
      frozen: tree of bools from `find_frozen`; None if nothing is frozen.
      freeze_steps: the number of updates after which frozen parameters thaw; until then their gradients have to be 0.
        None: they never thaw.
      layers: the first parts of the parameters' paths, from the stem to the classifier. Needed if `layer_decay` is
        not 1.

    Returns:
      An optax transformation whose `update` needs the parameters. Its state holds arrays and nothing else.

    Raises:
      ValueError: a pattern of `decay_rules` matches no parameter.
    """
    clip = optax.clip_by_global_norm(optim_config.clip_norm) if optim_config.clip_norm else optax.identity()
    make_stages = _plan_stages(optim_config, params, layers)
    if frozen is None:
        return optax.chain(clip, *make_stages(schedule))
    labels = jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)
    if freeze_steps is None:
        trained = optax.chain(clip, *make_stages(schedule))
        return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
    thawing = _start_at(freeze_steps, schedule, make_stages)
    return optax.chain(
        clip, optax.partition({"trained": optax.chain(*make_stages(schedule)), "frozen": thawing}, labels)
    )


Stages = tuple[optax.GradientTransformation, ...]


def _plan_stages(optim_config, params, layers: Sequence[str]) -> Callable[[optax.Schedule], Stages]:
    """Return a function from a learning-rate schedule to the stages that turn gradients into updates.

    Every stage is there whatever its strength, because the structure of the state, and so of a checkpoint, may depend
    on `name`, `freeze` and `freeze_epochs` only.
    """
    factors = match_rules(params, optim_config.decay_rules, key="optim.decay_rules")
    l2 = jax.tree.map(lambda factor: factor * optim_config.l2, factors)
    weight_decay = jax.tree.map(lambda factor: factor * optim_config.weight_decay, factors)

    def make_stages(schedule: optax.Schedule) -> Stages:
        return (
            _add_params(l2, optax.constant_schedule(1.0)),
            OPTIMIZERS[optim_config.name](optim_config, schedule),
            _add_params(weight_decay, lambda step: jnp.negative(schedule(step))),
            _scale_layers(layers, optim_config.layer_decay),
        )

    return make_stages


def _start_at(
    first: int, schedule: optax.Schedule, make_stages: Callable[[optax.Schedule], Stages]
) -> optax.GradientTransformation:
    """Return the stages for parameters that thaw at step `first`: their optimizer counts its own steps from there."""
    stages = make_stages(lambda step: schedule(step + first))
    return optax.conditionally_mask(optax.chain(*stages), lambda step, **_: jnp.greater_equal(step, first))


def find_frozen(optim_config, params):
    """Return a tree of bools like `params`: true for the parameters that `optim.freeze` names.

    Raises ValueError if a pattern matches nothing, or if all parameters match.
    """
    rules = [(pattern, "frozen") for pattern in optim_config.freeze] + [(".*", "trained")]
    labels = match_rules(params, rules, key="optim.freeze")
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError(f"optim.freeze is {tuple(optim_config.freeze)}, which leaves no parameter to train")
    return jax.tree.map(lambda label: label == "frozen", labels)


def _rmsprop(optim_config, schedule: optax.Schedule) -> optax.GradientTransformation:
    # tf.compat.v1.train.RMSPropOptimizer: the accumulator starts at 1, epsilon is inside the root, and the learning
    # rate is inside the momentum.
    return optax.rmsprop(
        schedule,
        optim_config.rms_decay,
        optim_config.epsilon,
        initial_scale=1.0,
        eps_in_sqrt=True,
        momentum=optim_config.momentum,
    )


def _sgd(optim_config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(schedule, optim_config.momentum, nesterov=optim_config.nesterov)


def _adam(optim_config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adam(schedule, optim_config.beta1, optim_config.beta2, optim_config.epsilon)


# `make_optimizer` adds the weight decay that turns Adam into AdamW, as it does for the other two.
OPTIMIZERS: dict[str, Callable[[Any, optax.Schedule], optax.GradientTransformation]] = {
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "adamw": _adam,
}


def _add_params(factors, coefficient: optax.Schedule) -> optax.GradientTransformation:
    """Return a stage that adds coefficient(step) * factor * w to the update of each parameter w with a factor not 0.

    The factors are looked up by path, because under `optax.partition` the tree has holes at frozen parameters.
    """
    by_path = dict(_name_leaves(factors))

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        now = coefficient(state.count)

        def add(path, update, param):
            factor = by_path[_join(path)]
            return update + now * factor * param if factor else update

        updates = jax.tree_util.tree_map_with_path(add, updates, params)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _scale_layers(layers: Sequence[str], decay: float) -> optax.GradientTransformation:
    """Return a stage that scales the updates of a layer by decay^n for n layers above it (1801.06146, sec. 3.2)."""
    rates = {name: decay**above for above, name in enumerate(reversed(layers))}

    def update(updates, _):
        return jax.tree_util.tree_map_with_path(lambda path, u: rates[_join(path).split("/")[0]] * u, updates)

    return optax.stateless(update) if decay != 1 else optax.identity()


def match_rules(params, rules: Sequence[tuple[str, Any]], *, key: str):
    """Give each parameter the value of the first rule whose pattern is found in its path.

    Args:
      params: tree of arrays or of anything with a `size`.
      rules: (pattern, value) pairs; `re.search` looks for the pattern in paths such as "block_03/expand/conv/kernel".
      key: the key of the config, for errors and for the log, which gets one line per rule.

    Returns:
      A tree like `params`, with the values as leaves.

    Raises:
      ValueError: a pattern is no regular expression, a parameter matches no rule, or a rule gets no parameter because
        the rules before it take them all. Only the catch-all ".*" may match nothing.
    """
    try:
        patterns = [re.compile(pattern) for pattern, _ in rules]
    except re.error as error:
        raise ValueError(f"{key}: {error.pattern!r} is no regular expression: {error}") from error
    sizes: list[list[int]] = [[] for _ in rules]
    values = []
    for path, leaf in _name_leaves(params):
        first = next((i for i, pattern in enumerate(patterns) if pattern.search(path)), None)
        if first is None:
            raise ValueError(f"{key}: no rule matches {path!r}; a last rule '.*' would take what is left")
        sizes[first].append(leaf.size)
        values.append(rules[first][1])
    for (pattern, value), matched in zip(rules, sizes, strict=True):
        if not matched and pattern != ".*":
            raise ValueError(
                f"{key}: {pattern!r} matches no parameter that the patterns before it leave; "
                "paths look like 'block_03/expand/conv/kernel'"
            )
        logging.info("%s: %r: %s for %d parameters, %d elements", key, pattern, value, len(matched), sum(matched))
    return jax.tree.unflatten(jax.tree.structure(params), values)


def _name_leaves(tree) -> list[tuple[str, Any]]:
    return [(_join(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _join(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
