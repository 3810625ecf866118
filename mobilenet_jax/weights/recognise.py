"""Which network the tensors of a stranger's file are: unwrapped, chosen, renamed and identified."""

import contextlib
import functools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mobilenet_jax.weights import WeightsError, printable
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.naming import Match, Naming, align_by_order, identify, list_some
from mobilenet_jax.weights.pth import Opaque
from mobilenet_jax.weights.slim_names import SLIM
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION
from mobilenet_jax.weights.transformers_names import TRANSFORMERS

NAMINGS = {naming.framework: naming for naming in (TORCHVISION, TIMM, KERAS, TRANSFORMERS, SLIM)}
# PyTorch's counts of training steps, one for each norm, and of averaged models.
_COUNTERS = ("num_batches_tracked", "n_averaged")
# Words in the names of averaged weights: timm's state_dict_ema, torchvision's model_ema, TensorFlow's variables.
_AVERAGED = {"ema", "averaged", "swa", "shadow", "exponentialmovingaverage"}
_DEPTH_LIMIT = 60  # of dicts and modules in each other
_KEY_LIMIT = 200  # characters of a key on the way to tensors; every place repeats the keys above it
_CHOICES_LIMIT = 100  # networks in a file
_SEGMENTATION = "segmentation_head."  # of transformers' MobileNetV2ForSemanticSegmentation
# torchvision's networks without `features.`, as `model.features.state_dict()` and `nn.Sequential` write them.
_BARE_STEM, _BARE_BLOCKS = "0.0.weight", ("1.conv.0.0.weight", "1.block.0.0.weight")

Tree = Mapping[str, Any]  # of tensors and further dicts; whatever has a `shape` is a tensor


@dataclass(frozen=True)
class Recognised:
    """A network, its tensors by the framework's names, and what was done to find them, one sentence each."""

    match: Match
    tensors: dict[str, Any]
    notes: list[str]
    is_changed: bool = False  # its last layers are not those of the framework, so someone has trained it again


@dataclass(frozen=True)
class _Choice:
    """A network in a file: its tensors, and the start of their names where another one belongs."""

    naming: Naming
    tensors: dict[str, Any]
    prefix: str
    replacement: str

    def rename(self, others: list[str]) -> dict[str, Any]:
        """Return the tensors by the framework's names, without those that have the prefixes of other networks."""
        renamed = {}
        for name, tensor in self.tensors.items():
            if name.startswith(self.prefix):
                renamed[self.replacement + name.removeprefix(self.prefix)] = tensor
            elif not any(name.startswith(other) for other in others):
                renamed.setdefault(name, tensor)
        return renamed


def recognise(
    tree: Any, name: str | None, *, source: str, select: str | None = None, classifier: str = "keep"
) -> Recognised:
    """Return the network that a file's tensors belong to.

    Args:
      tree: what the file holds, as `read.Contents.tree`.
      name: FRAMEWORK/MODEL, if it is known.
      source: the file, for errors.
      select: which of several networks in the file; None takes averaged weights if there are some.
      classifier: "keep" needs the network to have the file's classifier, "drop" leaves out all behind the pooling.

    Raises:
      WeightsError: no network fits, or several do. The message names the best match and what differs.
    """
    naming, model = _parse_name(name)
    chosen, tensors, notes = _choose(tree, naming, select, source)
    tensors = {n: tensor for n, tensor in tensors.items() if n.rpartition(".")[2] not in _COUNTERS}
    shapes = {n: tuple(tensor.shape) for n, tensor in tensors.items()}
    find = functools.partial(identify, chosen, name=model, source=source)
    try:
        if classifier == "keep":
            return Recognised(find(shapes), tensors, notes)
    except WeightsError as error:
        found = _adopt_head(chosen, tensors, model, source, error)
        return replace(found, notes=[*notes, *found.notes])
    match = find(shapes, drop=True)
    left_out = [n for n in tensors if n not in match.slots]
    notes = [*notes, f"left out: {list_some(left_out)}"] if left_out else notes
    return Recognised(match, tensors, notes, is_changed=True)


def _parse_name(name: str | None) -> tuple[Naming | None, str | None]:
    if name is None:
        return None, None
    framework, _, model = name.partition("/")
    if framework not in NAMINGS or not model:
        raise WeightsError(f"name is {name!r}; valid: FRAMEWORK/MODEL, the framework of {', '.join(NAMINGS)}")
    return NAMINGS[framework], model


def _choose(
    tree: Any, naming: Naming | None, select: str | None, source: str
) -> tuple[Naming, dict[str, Any], list[str]]:
    """Return (the framework, the tensors by its names, notes) of one network of the tree."""
    states = find_states(tree)
    choices = dict(_list_choices(states, [naming] if naming else list(NAMINGS.values())))
    if len(choices) > _CHOICES_LIMIT:
        raise WeightsError(f"{source} holds {len(choices):,} networks; valid: at most {_CHOICES_LIMIT}")
    if not choices:
        tensors = max(states.values(), key=len, default={})
        if select is None and (naming or _looks_like_keras(tensors)):
            return naming or KERAS, tensors, []
        known, some = ", ".join(NAMINGS), list_some(tensors) or "none"
        raise WeightsError(f"{source} holds no MobileNet of {known}; its tensors: {some}")
    averaged = [label for label in choices if _AVERAGED & set(re.split(r"[^a-z0-9]+", label.lower()))]
    candidates = [select] if select is not None else averaged or list(choices)
    if len(candidates) > 1 or candidates[0] not in choices:
        what = f"no {printable(str(select))}" if select is not None else "several networks"
        labels = ", ".join(printable(label) for label in choices)
        raise WeightsError(f"{source} holds {what}; choose with select=NAME (--select=NAME): {labels}")
    label = candidates[0]
    choice = choices[label]
    notes = []
    if select is None and len(choices) > 1:
        others = list_some([other for other in choices if other != label])
        notes.append(f"the averaged weights {printable(label)} were taken, not {others}; select=NAME takes others")
    if choice.replacement:
        notes.append(f"{choice.replacement!r} was put in the place of {printable(choice.prefix)!r} in its names")
    elif choice.prefix and choice.naming is not TRANSFORMERS:
        notes.append(f"the prefix {printable(choice.prefix)!r} of its names was removed")
    others = [c.prefix for c in choices.values() if c.tensors is choice.tensors and c is not choice and c.prefix]
    return choice.naming, choice.rename(others), notes


def _list_choices(states: dict[str, dict[str, Any]], namings: list[Naming]) -> Iterator[tuple[str, _Choice]]:
    """Yield (label, choice) for each network whose stem is in one of the states."""
    for path, tensors in states.items():
        found = list(dict.fromkeys(_find_prefixes(tensors, namings)))
        for naming, prefix, replacement in found:
            parts = [path, prefix.strip("./") if len(found) > 1 else ""]
            yield ".".join(filter(None, parts)) or "all", _Choice(naming, tensors, prefix, replacement)


@functools.cache
def _list_stems(naming: Naming) -> tuple[str, ...]:
    return naming.list_stems()


def _find_prefixes(tensors: dict[str, Any], namings: list[Naming]) -> Iterator[tuple[Naming, str, str]]:
    """Yield (framework, what comes before its names, what belongs there instead) for each stem among the names."""
    for naming in namings:
        for stem in _list_stems(naming):
            for name in tensors:
                if name == stem or name.endswith((f".{stem}", f"/{stem}")):
                    yield naming, name.removesuffix(stem), ""
    if TORCHVISION in namings:
        for name in tensors:
            prefix = name.removesuffix(_BARE_STEM)
            is_bare = name.endswith(_BARE_STEM) and not prefix.endswith("features.")
            if is_bare and any(f"{prefix}{block}" in tensors for block in _BARE_BLOCKS):
                yield TORCHVISION, prefix, "features."


def find_states(tree: Any) -> dict[str, dict[str, Any]]:
    """Return {place in the tree: the tensors directly there} for every dict and every whole model that has tensors."""
    found: dict[str, dict[str, Any]] = {}
    queue, seen = deque([("", tree, 0)]), set()
    while queue:
        path, value, depth = queue.popleft()
        if isinstance(value, Opaque):
            tensors, children = dict(_list_module(value)), {}
        elif isinstance(value, Mapping):
            children = {key: child for key, child in value.items() if isinstance(key, str)}
            tensors = {key: child for key, child in children.items() if _is_tensor(child)}
        else:
            continue
        if id(value) in seen or depth > _DEPTH_LIMIT:
            continue
        seen.add(id(value))
        if tensors:
            found[path] = tensors
        for key, child in children.items():
            if isinstance(child, Mapping | Opaque):
                place = printable(key, limit=_KEY_LIMIT)
                queue.append((f"{path}.{place}" if path else place, child, depth + 1))
    return found


def _list_module(module: Opaque) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of a whole model, as its `state_dict()` would have them; of TorchScript's too."""
    queue: deque[tuple[str, Any, int]] = deque([("", module, 0)])
    seen = set()
    while queue:
        prefix, value, depth = queue.popleft()
        state = value.state
        if not isinstance(state, dict) or id(value) in seen or depth > _DEPTH_LIMIT:
            continue
        seen.add(id(value))
        parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
        members = [part for part in parts if isinstance(part, dict)] or [state]
        for key, child in (item for part in members for item in part.items() if isinstance(item[0], str)):
            if len(key) > _KEY_LIMIT:
                continue
            if _is_tensor(child):
                yield f"{prefix}{key}", child
            elif isinstance(child, Opaque):
                queue.append((f"{prefix}{key}.", child, depth + 1))


def _is_tensor(value: Any) -> bool:
    return isinstance(getattr(value, "shape", None), tuple)


def _looks_like_keras(tensors: dict[str, Any]) -> bool:
    return bool(tensors) and all("/" in name for name in tensors)


def _read_by_order(naming: Naming, tensors: dict[str, Any], model: str | None, source: str) -> Recognised | None:
    """Return the network of an old Keras file, whose names are read by their order; None if it is none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for names in align_by_order(naming, shapes) if naming is KERAS else ():
        renamed = {new: tensors[old] for old, new in names.items()}
        try:
            match = identify(naming, {n: tuple(t.shape) for n, t in renamed.items()}, name=model, source=source)
        except WeightsError:
            continue
        return Recognised(match, renamed, [])
    return None


def _adopt_head(
    naming: Naming, tensors: dict[str, Any], model: str | None, source: str, error: WeightsError
) -> Recognised:
    """Return the network of a file whose last layers have other names.

    One dense layer behind the pooling is the classifier, whatever its name. Raises `error`, or one that names the
    layers, if there is anything else.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        backbone = identify(naming, shapes, name=model, source=source, drop=True)
    except WeightsError:
        found = _read_by_order(naming, tensors, model, source)
        if found is None:
            raise error from None
        return found
    others = {n: shape for n, shape in shapes.items() if n not in backbone.slots}
    layer = naming.name_layers(backbone.spec)["classifier"][0]
    kernel, bias = layer + naming.leaves["kernel"], layer + naming.leaves["bias"]
    dense = {n.rpartition(naming.leaves["kernel"][0])[0] for n in others}
    old = {len(shape): n for n, shape in others.items()}
    if len(others) == 2 and len(dense) == 1 and old.keys() in ({1, 2}, {1, 4}):
        names = {old[max(old)]: kernel, old[1]: bias}
        renamed = {names.get(n, n): tensor for n, tensor in tensors.items()}
        shapes = {names.get(n, n): shape for n, shape in shapes.items()}
        # Some networks store the classifier as a 1x1 convolution.
        for shape in (shapes[kernel], naming.layout.widen(shapes[kernel])):
            with contextlib.suppress(WeightsError):  # it is no classifier of this network, which `error` says
                match = identify(naming, {**shapes, kernel: shape}, name=model, source=source)
                return Recognised(match, renamed, [f"{printable(dense.pop())} was taken as the classifier"], True)
    if naming is TRANSFORMERS and all(n.startswith(_SEGMENTATION) for n in others):
        note = f"the segmentation head was left out: {list_some(others)}"
        return Recognised(backbone, tensors, [note], True)
    raise WeightsError(
        f'{error}; without the layers behind the pooling it is {backbone.name}: classifier="drop" '
        "(--classifier=drop) loads that"
    ) from None
