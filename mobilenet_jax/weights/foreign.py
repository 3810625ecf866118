"""The tensors of another framework -> (spec, variables, card)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import traverse_util

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.options import apply_options
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.weights import WeightsError, printable
from mobilenet_jax.weights.card import Preprocessing, check_card, hash_file, make_card, read_imagenet_classes
from mobilenet_jax.weights.folder import Hints
from mobilenet_jax.weights.keras_config import read_preprocessing as read_keras
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.naming import Match, compare
from mobilenet_jax.weights.read import KERAS_CONFIG, Contents, Tensors
from mobilenet_jax.weights.recognise import NAMINGS, Recognised, find_states, recognise
from mobilenet_jax.weights.torch_names import PUBLISHED_PREPROCESSING

CARD_SUFFIX = ".card.json"  # of the card beside a file that cannot hold one: mine.pth.card.json
BELONGS_TO = "belongs_to_sha256"  # the key of such a card that has the SHA-256 of the file
_CARD_LIMIT = 10_000_000  # bytes
_BACKGROUND = 1001  # classes of TensorFlow's ImageNet weights; the first is the background
_RGB = 3
Variables = dict[tuple[str, ...], np.ndarray]


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what is asked of them; see `load_weights` for the last three."""

    label: str  # in errors
    file: str  # in the card
    hash: Callable[[], str]
    hints: Hints = field(default_factory=Hints)
    select: str | None = None
    classifier: str = "keep"
    in_channels: int | None = None


def load_foreign(contents: Contents, source: Source) -> tuple[Spec, dict, dict]:
    """Return (spec, variables, card) of another framework's tensors.

    What `source.hints` says replaces the model's usual preprocessing and class names.

    Raises WeightsError if the tensors fit no network.
    """
    hints = source.hints
    found = recognise(
        contents.tree, hints.name, source=source.label, select=source.select, classifier=source.classifier
    )
    match, notes = found.match, list(found.notes)
    if found.match.spec.num_classes == 1:
        raise WeightsError(
            f'{source.label} has a classifier of one output, for a sigmoid, not for classes; classifier="drop" '
            "(--classifier=drop) loads the network without it"
        )
    usual, assumed = _find_preprocessing(contents, match, is_dropped=source.classifier == "drop")
    if found.is_changed and hints.preprocessing is None:
        notes += assumed
    flat = _fill(contents, found, source.label)
    spec = apply_options(replace(match.spec, **hints.changes), **hints.options)
    names = hints.class_names
    if spec.num_classes == _BACKGROUND:
        notes.append(f"class 0 of {_BACKGROUND}, the background, was dropped")
        spec = replace(spec, num_classes=_BACKGROUND - 1)
        for leaf in ("kernel", "bias"):
            flat["params", "classifier", leaf] = flat["params", "classifier", leaf][..., 1:]
        names = names[1:] if names else None
    if source.in_channels is None and spec.in_channels != _RGB:
        raise WeightsError(
            f"{source.label} has a stem for {spec.in_channels} channels, not for the {_RGB} of RGB images; in_channels="
            f"{spec.in_channels} loads it as it is, in_channels={_RGB} shares its kernel among {_RGB} channels"
        )
    spec, flat = adapt_stem(spec, flat, source.in_channels or _RGB, notes)
    for note in notes:
        logging.warning("%s: %s", printable(source.label), note)
    sha256 = source.hash()
    usual = PUBLISHED_PREPROCESSING.get(sha256[:8], usual)
    is_named = names is not None and len(names) == spec.num_classes
    card = make_card(
        name=hints.name or match.name,
        model=match.entry.model,
        width=match.width,
        convention=match.entry.convention,
        spec=spec,
        preprocessing=hints.preprocessing or usual,
        class_names=names if is_named else read_imagenet_classes() if spec.num_classes == 1000 else None,
        source={"file": source.file, "sha256": sha256},
        notes=notes,
    )
    return spec, _unflatten(flat), card


def _find_preprocessing(contents: Contents, match: Match, *, is_dropped: bool) -> tuple[Preprocessing, list[str]]:
    """Return (preprocessing, notes if it is assumed) of a network that nothing else is known of."""
    if match.name.startswith(KERAS.framework):
        return read_keras(contents.metadata.get(KERAS_CONFIG, ""), drop=is_dropped)
    return PUBLISHED_PREPROCESSING.get(match.name, match.entry.preprocessing), []


def _fill(contents: Contents, found: Recognised, label: str) -> Variables:
    """Return {path: variable} of a network that was recognised."""
    slots = found.match.slots
    tensors = contents.load({name: found.tensors[name] for name in slots})
    return {slot.path: slot.to_variable(to_float32(name, tensors[name], label)) for name, slot in slots.items()}


def load_with_card(contents: Contents, card: dict, source: Source) -> tuple[Spec, dict, dict]:
    """Return (spec, variables, card) of a file of another framework with a card beside it, which says the network.

    Raises WeightsError if the tensors are not those of the card's network.
    """
    spec = check_card(card, source=source.label)
    shapes: dict[str, tuple[int, ...]] = {}
    closest = (0, "")
    for tensors in find_states(contents.tree).values():
        shapes = {n: tuple(tensor.shape) for n, tensor in tensors.items() if not n.endswith("num_batches_tracked")}
        for naming in NAMINGS.values():
            try:
                slots = naming.list_slots(spec)
            except (KeyError, ValueError):  # the framework has no such network
                continue
            count, differences = compare({name: slot.shape for name, slot in slots.items()}, shapes)
            if not count:
                numbers = contents.load({name: tensors[name] for name in slots})
                flat = {s.path: s.to_variable(to_float32(n, numbers[n], source.label)) for n, s in slots.items()}
                return spec, _unflatten(flat), card
            closest = min(closest, (count, differences)) if closest[1] else (count, differences)
    raise WeightsError(f"{source.label} does not fit the network of the card beside it: {closest[1] or 'no tensors'}")


def read_card_beside(path: Path) -> dict | None:
    """Return the card that `save_weights` wrote beside a file; None if there is none.

    Raises WeightsError if it is damaged, or belongs to another file.
    """
    beside = path.with_name(path.name + CARD_SUFFIX)
    if not beside.is_file():
        return None
    if beside.stat().st_size > _CARD_LIMIT:
        raise WeightsError(f"{beside} is larger than {_CARD_LIMIT:,} bytes")
    try:
        card = json.loads(beside.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{beside} is no JSON: {error}") from error
    belongs_to = card.pop(BELONGS_TO, None) if isinstance(card, dict) else None
    if belongs_to != hash_file(path):
        raise WeightsError(f"{beside} was not written for the {path.name} beside it; delete it, or convert again")
    return card


def adapt(spec: Spec, variables: dict, card: dict, source: Source) -> tuple[Spec, dict, dict]:
    """Return a network of our own without its classifier and with other input channels, if `source` asks for it."""
    notes = list(card["notes"])
    flat: Any = traverse_util.flatten_dict(variables)
    if source.classifier == "drop" and spec.num_classes:
        spec = replace(spec, num_classes=0)
        flat = {path: leaf for path, leaf in flat.items() if path[1] != "classifier"}
        card = {**card, "class_names": None}
        notes.append("left out: the classifier")
    if source.in_channels is not None:
        spec, flat = adapt_stem(spec, flat, source.in_channels, notes)
    return spec, _unflatten(flat), {**card, "spec": to_json(spec), "notes": notes}


def adapt_stem(spec: Spec, flat: Variables, wanted: int, notes: list[str]) -> tuple[Spec, Variables]:
    """Return the network for so many input channels; add a note if that changes it.

    The stem's kernel is summed over its input channels and shared equally among the new ones, so that a grey image
    gives the same answer in both networks.
    """
    has, path = spec.in_channels, ("params", "stem", "conv", "kernel")
    if wanted == has:
        return spec, flat
    if wanted < 1:
        raise WeightsError(f"in_channels is {wanted}; valid: 1 or more")
    kernel = flat[path].sum(axis=2, keepdims=True, dtype=np.float64)
    kernel = np.repeat(kernel / wanted, wanted, axis=2).astype(np.float32)
    notes.append(f"the kernel of the stem was summed over {has} channels and shared among {wanted}")
    return replace(spec, in_channels=wanted), {**flat, path: kernel}


def _unflatten(flat: dict[tuple[str, ...], np.ndarray]) -> dict:
    return traverse_util.unflatten_dict({path: np.ascontiguousarray(leaf) for path, leaf in flat.items()})


def fill_own(spec: Spec, tensors: Tensors, label: str) -> dict:
    """Return the variables of our own file; raise WeightsError if they are not those of the card's network."""
    shapes = {"/".join(place): shape for place, shape in variable_shapes(spec).items()}
    count, differences = compare(shapes, {name: tensor.shape for name, tensor in tensors.items()})
    if count:
        raise WeightsError(f"{label} does not fit the network of its card: {differences}")
    return traverse_util.unflatten_dict({name: to_float32(name, tensors[name], label) for name in shapes}, sep="/")


def to_float32(name: str, tensor: Any, label: str) -> np.ndarray:
    """Return the numbers in float32; raise WeightsError for integers, NaN, infinity, and a variance below 0."""
    name = printable(name)
    if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise WeightsError(f"{name} of {label} is {tensor.dtype}; valid: float16, bfloat16, float32, float64")
    with np.errstate(over="ignore"):
        values = np.asarray(tensor, np.float32)
    is_variance = name.endswith(("running_var", "moving_variance", "norm/var"))
    if not np.isfinite(values).all() or (is_variance and (values < 0).any()):
        raise WeightsError(f"{name} of {label} has values that are not finite, or a variance below 0")
    return values
