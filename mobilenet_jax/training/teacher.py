"""The teacher of a run: weights of any kind, checked against the data and the student, and prepared for the step."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from mobilenet_jax.data.sources import DataInfo
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.training.classes import match_classes, reorder_classes
from mobilenet_jax.training.distill import Distillation
from mobilenet_jax.weights.card import hash_variables
from mobilenet_jax.weights.load import load_weights


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained network that a run learns from."""

    distillation: Distillation
    variables: dict  # with the classes in the order of the data set
    sha256: str  # of the variables and of what their card says of images and classes


def load_teacher(config, student: Spec, info: DataInfo) -> Teacher | None:
    """Return the teacher of `config.train.distill`; None if it names no weights.

    Its program has the dtype, the lowering and the precision of the student's.

    Raises:
      ValueError: its classes, those of the data and those of the student differ, its images would be too small for it,
        or the file cannot be read (`WeightsError`), in one sentence.
      FileNotFoundError: there is no such file, workdir or name.
    """
    keys = config.train.distill
    if not keys.weights:
        return None
    model, data = config.model, config.data
    network, variables, card = load_weights(keys.weights, keys.name or None, lowering=model.lowering, dtype=model.dtype)
    order = _match_classes(config, network.spec, student, card, info)
    theirs = card["preprocessing"] if keys.prepare == "teacher" else data
    try:
        compute_cost(network.spec, theirs["image_size"])
    except ValueError as error:
        raise ValueError(
            f"train.distill.prepare is {keys.prepare!r}, which gives the teacher images of {theirs['image_size']} px: "
            f"{error}"
        ) from error
    own_mean, own_std, mean, std = (
        np.asarray(x, np.float64) for x in (data.mean, data.std, theirs["mean"], theirs["std"])
    )
    teacher = Teacher(
        distillation=Distillation(
            network=network.clone(precision=model.precision),
            scale=tuple((own_std / std).tolist()),
            shift=tuple(((own_mean - mean) / std).tolist()),
            image_size=theirs["image_size"],
            interpolation=theirs["interpolation"],
            divergence=keys.divergence,
            temperature=keys.temperature,
            weight=keys.weight,
        ),
        variables=reorder_classes(variables, order),
        sha256=_hash(variables, card),
    )
    logging.info("teacher %s (%s), which sees the images at %d px", keys.weights, card["name"], theirs["image_size"])
    return teacher


def _match_classes(config, teacher: Spec, student: Spec, card: dict, info: DataInfo) -> list[int]:
    """Return the class of the teacher for each class of the data; raise ValueError unless all three have the same."""
    weights, source = config.train.distill.weights, config.data.source
    if student.num_classes != info.num_classes:
        raise ValueError(
            f"model.num_classes is {student.num_classes}, and {source} has {info.num_classes} classes; valid with "
            "train.distill.weights: as many as the data has, or none"
        )
    try:
        return match_classes(card["class_names"], teacher.num_classes, info.class_names, data=source)
    except ValueError as error:
        raise ValueError(f"train.distill.weights {weights!r} cannot teach {source}: {error}") from error


def _hash(variables: dict, card: dict) -> str:
    about: dict[str, Any] = {name: card[name] for name in ("spec", "preprocessing", "class_names")}
    text = json.dumps(about, sort_keys=True) + hash_variables(variables)
    return hashlib.sha256(text.encode()).hexdigest()
