"""From a config to everything that stays the same during a run."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from mobilenet_jax.data.sources import DataInfo, Splits, describe_split, open_splits
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.paths import as_path, check_reachable
from mobilenet_jax.training.config import flatten_config, follow_card
from mobilenet_jax.training.optim import find_frozen, make_optimizer, make_schedule
from mobilenet_jax.training.plan import Plan, make_plan, warn_of_short_run
from mobilenet_jax.training.sharding import make_mesh
from mobilenet_jax.training.teacher import Teacher, load_teacher
from mobilenet_jax.training.validate import check_config, check_trains_classifier_alone
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.checkpoint import TEACHER_KEY

Weights = tuple[MobileNet, dict, dict]  # model, variables, card


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A config and a workdir, with all that follows from them; training changes none of it."""

    workdir: epath.Path
    config: Any  # with every key that the card of weights fills
    flat_config: dict[str, Any]  # the config as config.json and checkpoints hold it
    mesh: Mesh
    splits: Splits
    info: DataInfo
    model: MobileNet
    plan: Plan
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    frozen: Any  # a tree of bools: the parameters that optim.freeze names; None if it names none
    teacher: Teacher | None  # the network that train.distill names
    load_init: Callable[[], Weights]  # loads the weights of config.init, once
    seconds: float  # that building took


def build(config, workdir: str | os.PathLike) -> Setup:
    """Return the setup of a run. This reads listings and headers of the data, compiles nothing and writes nothing.

    Raises:
      ValueError, OSError: a config or a data set that does not fit, in one sentence.
    """
    start = time.perf_counter()
    folder = as_path(workdir)
    check_reachable(folder)
    load_init = functools.cache(
        functools.partial(
            load_weights,
            config.init,
            config.init_name or None,
            select=config.init_select or None,
            classifier=config.init_classifier,
        )
    )
    config = follow_card(config, lambda: load_init()[2])
    mesh = make_mesh()
    check_config(config, device_count=mesh.size, process_count=jax.process_count())
    splits = open_splits(config.data)
    for source in splits:
        logging.info("%s", describe_split(source))
    info = splits.describe()
    model = build_model(config, info)
    plan = make_plan(config, info.train_count)
    warn_of_short_run(config, plan, info.train_count)
    schedule, optimizer, frozen = build_optimizer(config, model.spec, plan)
    teacher = load_teacher(config, model.spec, info)
    derived = {
        "model.num_classes": model.spec.num_classes,
        "data.train_images": info.train_count,
        "processes": jax.process_count(),
        TEACHER_KEY: teacher and teacher.sha256,
    }
    return Setup(
        workdir=folder,
        config=config,
        flat_config={**flatten_config(config), **derived},
        mesh=mesh,
        splits=splits,
        info=info,
        model=model,
        plan=plan,
        schedule=schedule,
        optimizer=optimizer,
        frozen=frozen,
        teacher=teacher,
        load_init=load_init,
        seconds=time.perf_counter() - start,
    )


def build_model(config, info: DataInfo) -> MobileNet:
    """Return the model of `config.model` for the classes of the data set.

    Raises ValueError for an impossible value, fewer classes than the data has, or images too small for the strides.
    """
    options = config.model.to_dict()
    options["num_classes"] = info.num_classes if options["num_classes"] is None else options["num_classes"]
    if options["num_classes"] < info.num_classes:
        raise ValueError(
            f"model.num_classes is {options['num_classes']}; {config.data.source} has {info.num_classes} classes"
        )
    if options["in_channels"] not in (None, 3):
        raise ValueError(
            f"model.in_channels is {options['in_channels']}; valid: 3, or none, because every data source gives images "
            "of 3 channels, grey ones too (in Python, create_model(in_channels=...) builds the network for other data)"
        )
    model = create_model(**options, freeze_stats=config.train.freeze_stats)
    try:
        compute_cost(model.spec, config.data.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size is {config.data.image_size}: {error}") from error
    return model


def build_optimizer(config, spec: Spec, plan: Plan) -> tuple[optax.Schedule, optax.GradientTransformation, Any]:
    """Return the learning-rate schedule, the optimizer, and the tree of frozen parameters (None if none is frozen)."""
    params = list_param_shapes(spec)
    schedule = make_schedule(
        config.optim,
        batch_size=config.data.batch_size,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=plan.total_steps,
    )
    frozen = find_frozen(config.optim, params) if config.optim.freeze else None
    if config.train.cache_features:
        check_trains_classifier_alone(frozen, params)
    optimizer = make_optimizer(
        config.optim,
        params,
        schedule=schedule,
        frozen=frozen,
        freeze_steps=None if config.optim.freeze_epochs is None else plan.freeze_steps,
        layers=[*(name for name, _, _ in spec.rows()), *(op.name for op in spec.tail_ops())],
    )
    return schedule, optimizer, frozen


def list_param_shapes(spec: Spec) -> Any:
    """Return the tree of parameters with `jax.ShapeDtypeStruct`s as leaves."""
    shapes = {path[1:]: shape for path, shape in variable_shapes(spec).items() if path[0] == "params"}
    leaves = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(leaves)
