"""What another framework calls a network's tensors, how it lays them out, and which network a file holds."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import Preprocessing

Shapes = Mapping[str, tuple[int, ...]]
# Multipliers that some framework publishes weights for; others are searched between the ends.
_WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25, 1.1, 1.2, 1.25, 1.3, 1.4, 1.5, 2.0)
_WIDTH_RANGE = (1 / 32, 8.0)
_NAME = re.compile(r"(?P<model>\w+?)(?:_(?P<percent>\d{3}))?(?:\.(?P<tag>\w+))?")


@dataclass(frozen=True)
class Entry:
    """A model of a framework, at any width, with the preprocessing of the weights that are its default."""

    name: str  # the framework's own, without the width
    model: str  # ours
    convention: str
    preprocessing: Preprocessing
    width: float | None = None  # what the bare name stands for


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: the variable's path, and how the layouts differ."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # the tensor's
    core: tuple[int, ...]  # the same without the ones of a 1x1 convolution that stands for a dense layer
    axes: tuple[int, ...]  # the core's, in the variable's order

    def to_variable(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the variable's layout."""
        return tensor.reshape(self.core).transpose(self.axes)

    def to_tensor(self, variable: np.ndarray) -> np.ndarray:
        """The variable in the tensor's layout."""
        return variable.transpose(np.argsort(self.axes)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a framework orders the axes of a kernel: which of its axes is our first, second, ..."""

    conv: tuple[int, ...]  # ours: height, width, inputs of a group, outputs
    depthwise: tuple[int, ...]
    dense: tuple[int, ...]  # ours: inputs, outputs
    outputs: int  # the axis of the outputs, in any kernel: first or last

    def widen(self, core: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a dense kernel that is stored as a 1x1 convolution's."""
        return (*core, 1, 1) if self.outputs == 0 else (1, 1, *core)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The names and the layout of one framework."""

    framework: str
    entries: tuple[Entry, ...]
    # "block_03/se/reduce" -> the layer's name, and the name of the norm behind it
    name_layers: Callable[[Spec], dict[str, tuple[str, str]]]
    leaves: Mapping[str, str]  # what follows the layer's name: of kernel, bias, norm/scale, norm/mean, ...
    layout: Layout
    percent: bool  # whether names end in the width, as _050, unless it is the entry's

    def name_entry(self, entry: Entry, width: float) -> str:
        """The name by which `select` finds the entry."""
        suffix = f"_{100 * width:03.0f}" if self.percent and width != entry.width else ""
        return f"{self.framework}/{entry.name}{suffix}"

    def select(self, name: str) -> tuple[list[Entry], float | None]:
        """The entries of a name without its framework, and the width if the name says it; WeightsError for no entry."""
        found = _NAME.fullmatch(name)
        entries = [entry for entry in self.entries if found and entry.name == found["model"]]
        if not entries or not found:
            known = ", ".join(dict.fromkeys(self.name_entry(entry, entry.width or 1.0) for entry in self.entries))
            raise WeightsError(f"{self.framework} has no model {name!r} that is known here; valid: {known}")
        return entries, int(found["percent"]) / 100 if found["percent"] else entries[0].width

    def list_slots(self, spec: Spec) -> dict[str, Slot]:
        """Tensor's name -> slot, for every variable of the network, in the order the layers run."""
        layers = self.name_layers(spec)
        conv_heads = {"hidden": spec.hidden_is_conv, "classifier": spec.classifier_is_conv}
        slots = {}
        for path, shape in variable_shapes(spec).items():
            owner, leaf = path[-2:]
            layer = "/".join(path[1:-2] if owner in ("conv", "norm") else path[1:-1])
            name = layers[layer][owner == "norm"] + self.leaves[f"norm/{leaf}" if owner == "norm" else leaf]
            if leaf != "kernel":
                slots[name] = Slot(path, shape, shape, (0,))
                continue
            layout = self.layout
            is_dense = len(shape) == 2
            axes = layout.dense if is_dense else layout.depthwise if "depthwise" in path else layout.conv
            core = tuple(shape[i] for i in np.argsort(axes))
            stored_as_conv = is_dense and conv_heads.get(layer, True)
            slots[name] = Slot(path, layout.widen(core) if stored_as_conv else core, core, axes)
        return slots


@dataclass(frozen=True)
class Match:
    """The network that a file's tensors belong to."""

    name: str  # the framework's own, with the framework
    entry: Entry
    width: float
    spec: Spec
    slots: dict[str, Slot]


def identify(naming: Naming, shapes: Shapes, *, name: str | None, source: str) -> Match:
    """The network whose names and shapes the file's tensors have, all of them and no others.

    `name` is the framework's own, without the framework; none: it is read off the tensors.

    Raises:
      WeightsError: tensors that no network has, or that several have; the message names them.
    """
    entries, width = naming.select(name) if name else (_find_closest(naming, shapes), None)
    fits, closest = [], (math.inf, f"{naming.framework}/{name}, a network that cannot be built")
    for entry in entries:
        for match in _candidates(naming, entry, shapes, width):
            count, differences = compare({name: slot.shape for name, slot in match.slots.items()}, shapes)
            if not count:
                fits.append(match)
                break
            closest = min(closest, (count, f"{match.name}: {differences}"))
    if not fits:
        raise WeightsError(f"{source} does not fit {closest[1]}")
    if len(fits) > 1:
        raise WeightsError(
            f"{source} may be {' or '.join(match.name for match in fits)}: their tensors are the same, "
            "padding, batch norm's epsilon or fixed filters are not; give the name of one"
        )
    return fits[0]


def _find_closest(naming: Naming, shapes: Shapes) -> list[Entry]:
    """The entries, several if they have the same tensors, whose names are most of the file's."""

    def count_strangers(entry: Entry) -> int:
        spec = make_spec(entry.model, width=entry.width or 1.0, convention=entry.convention)
        return len(naming.list_slots(_fit_tail(naming, spec, shapes)).keys() ^ shapes.keys())

    counts = [count_strangers(entry) for entry in naming.entries]
    return [entry for entry, count in zip(naming.entries, counts, strict=True) if count == min(counts)]


def _candidates(naming: Naming, entry: Entry, shapes: Shapes, width: float | None) -> Iterator[Match]:
    """The entry's network with the file's classifier at the width, or the published widths and the one that fits."""

    def make(width: float) -> Spec:
        return _fit_tail(naming, make_spec(entry.model, width=width, convention=entry.convention), shapes)

    def list_widths() -> Iterator[float]:
        yield from (width,) if width else _WIDTHS
        if not width:
            yield _search_width(naming, make, shapes)

    for candidate in list_widths():
        try:
            spec = make(candidate)
        except ValueError:  # groups that divide no channels of this width
            continue
        yield Match(naming.name_entry(entry, candidate), entry, candidate, spec, naming.list_slots(spec))


def align_by_order(naming: Naming, shapes: Shapes) -> Iterator[dict[str, str]]:
    """{tensor's name: the name of today} of every network with as many tensors, of as many axes each, in this order.

    Keras reads its older files so, and the names in those it publishes are of several ages.
    """
    for entry in naming.entries:
        spec = make_spec(entry.model, convention=entry.convention)
        for tail in (spec, replace(spec, num_classes=0), replace(spec, num_classes=0, hidden=0)):
            slots = naming.list_slots(tail)
            if [len(slot.shape) for slot in slots.values()] == [len(shape) for shape in shapes.values()]:
                yield dict(zip(shapes, slots, strict=True))


def _fit_tail(naming: Naming, spec: Spec, shapes: Shapes) -> Spec:
    """The spec with the classes of the file's classifier, or without the layers behind the pooling that it lacks."""
    layers = naming.name_layers(spec)
    kernels = {layer: layers[layer][0] + naming.leaves["kernel"] for layer in ("hidden", "classifier")}
    if shape := shapes.get(kernels["classifier"]):
        return replace(spec, num_classes=shape[naming.layout.outputs])
    return replace(spec, num_classes=0, hidden=spec.hidden if kernels["hidden"] in shapes else 0)


def _search_width(naming: Naming, make: Callable[[float], Spec], shapes: Shapes) -> float:
    """The width at which the network's tensors have as many elements as the file's, by bisection: none shrinks."""

    def exceed(width: float) -> int:
        try:
            slots = naming.list_slots(make(width))
        except ValueError:  # groups that divide no channels of this width
            return -1
        return sum(math.prod(slots[name].shape) - math.prod(shapes[name]) for name in slots.keys() & shapes.keys())

    low, high = _WIDTH_RANGE
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if exceed(middle) < 0 else (low, middle)
    # Many widths are the same network: the roundest of them.
    return next((round(high, digits) for digits in (1, 2, 3) if not exceed(round(high, digits))), high)


def compare(expected: Shapes, found: Shapes) -> tuple[int, str]:
    """How many tensors differ, and which: the first of each kind."""
    groups = {
        "it lacks": [name for name in expected if name not in found],
        "it has unknown": [name for name in found if name not in expected],
        "of another shape are": [
            f"{name} {list(found[name])} (valid: {list(shape)})"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    texts = [f"{what} {_shorten(names)}" for what, names in groups.items() if names]
    return sum(map(len, groups.values())), "; ".join(texts)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
