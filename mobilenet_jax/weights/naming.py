"""The names and layouts of another framework's tensors, and the search for the network that a file holds."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError, printable
from mobilenet_jax.weights.card import Preprocessing

Shapes = Mapping[str, tuple[int, ...]]
# Width multipliers of published weights. Other widths are searched in _WIDTH_RANGE.
_WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25, 1.1, 1.2, 1.25, 1.3, 1.4, 1.5, 2.0)
_WIDTH_RANGE = (1 / 32, 8.0)
_NAME = re.compile(r"(?P<model>\w+?)(?:_(?P<percent>\d{3}))?(?:\.(?P<tag>\w+))?")


@dataclass(frozen=True)
class Entry:
    """A model of a framework at any width, with the preprocessing of its default weights."""

    name: str  # in the framework, without the width
    model: str  # our name
    convention: str
    preprocessing: Preprocessing
    width: float | None = None  # of the model whose name states no width


@dataclass(frozen=True)
class Slot:
    """The place of a tensor: its variable's path, and how the layouts differ."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # of the tensor
    core: tuple[int, ...]  # the shape, without the ones of a 1x1 convolution that stands for a dense layer
    axes: tuple[int, ...]  # axes of the core in the order of the variable's axes

    def to_variable(self, tensor: np.ndarray) -> np.ndarray:
        """Return the tensor in the variable's layout."""
        return tensor.reshape(self.core).transpose(self.axes)

    def to_tensor(self, variable: np.ndarray) -> np.ndarray:
        """Return the variable in the tensor's layout."""
        return variable.transpose(np.argsort(self.axes)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a framework orders the axes of a kernel: the numbers of its axes in our order."""

    conv: tuple[int, ...]  # our order: height, width, inputs of a group, outputs
    depthwise: tuple[int, ...]
    dense: tuple[int, ...]  # our order: inputs, outputs
    outputs: int  # the axis of the outputs in every kernel: 0 or -1

    def widen(self, core: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a dense kernel that is stored as a 1x1 convolution."""
        return (*core, 1, 1) if self.outputs == 0 else (1, 1, *core)


@dataclass(frozen=True, kw_only=True, eq=False)
class Naming:
    """The names and the layout of one framework."""

    framework: str
    entries: tuple[Entry, ...]
    # "block_03/se/reduce" -> the names of the layer and of the norm that follows it
    name_layers: Callable[[Spec], dict[str, tuple[str, str]]]
    leaves: Mapping[str, str]  # kernel, bias, norm/scale, norm/mean, ... -> what follows the layer's name
    layout: Layout
    percent: bool  # True if names end in the width, as _050, when it is not the entry's width
    all_convs: bool = False  # True if every dense kernel is stored as a 1x1 convolution

    def name_entry(self, entry: Entry, width: float) -> str:
        """Return the name by which `select` finds the entry."""
        suffix = f"_{100 * width:03.0f}" if self.percent and width != entry.width else ""
        return f"{self.framework}/{entry.name}{suffix}"

    def select(self, name: str) -> tuple[list[Entry], float | None]:
        """Return the entries with a name, given without its framework, and the width if the name states one.

        Raises WeightsError if there is no entry.
        """
        found = _NAME.fullmatch(name)
        entries = [entry for entry in self.entries if found and entry.name == found["model"]]
        if not entries or not found:
            known = ", ".join(dict.fromkeys(self.name_entry(entry, entry.width or 1.0) for entry in self.entries))
            raise WeightsError(f"{self.framework} has no model {name!r}; valid: {known}")
        return entries, int(found["percent"]) / 100 if found["percent"] else entries[0].width

    def list_stems(self) -> tuple[str, ...]:
        """Return the names that the stem's kernel has in the framework's networks."""
        specs = [make_spec(entry.model, convention=entry.convention) for entry in self.entries]
        return tuple(dict.fromkeys(self.name_layers(spec)["stem"][0] + self.leaves["kernel"] for spec in specs))

    def list_slots(self, spec: Spec) -> dict[str, Slot]:
        """Return {tensor's name: slot} for every variable of the network, in the order in which the layers run."""
        layers = self.name_layers(spec)
        conv_heads = {"hidden": spec.hidden_is_conv, "classifier": spec.classifier_is_conv}
        slots = {}
        for path, shape in variable_shapes(spec).items():
            owner, leaf = path[-2:]
            layer = "/".join(path[1:-2] if owner in ("conv", "norm") else path[1:-1])
            kind = (
                f"norm/{leaf}" if owner == "norm" else "depthwise" if owner == "conv" and "depthwise" in path else leaf
            )
            name = layers[layer][owner == "norm"] + self.leaves.get(kind, self.leaves["kernel"])
            if leaf != "kernel":
                slots[name] = Slot(path, shape, shape, (0,))
                continue
            layout = self.layout
            is_dense = len(shape) == 2
            axes = layout.dense if is_dense else layout.depthwise if "depthwise" in path else layout.conv
            core = tuple(shape[i] for i in np.argsort(axes))
            stored_as_conv = is_dense and (self.all_convs or conv_heads.get(layer, True))
            slots[name] = Slot(path, layout.widen(core) if stored_as_conv else core, core, axes)
        return slots


@dataclass(frozen=True)
class Match:
    """The network that a file's tensors belong to."""

    name: str  # as FRAMEWORK/MODEL
    entry: Entry
    width: float
    spec: Spec
    slots: dict[str, Slot]
    lost_head: bool = False  # the model has a last 1x1 convolution, the file does not


def identify(naming: Naming, shapes: Shapes, *, name: str | None, source: str, drop: bool = False) -> Match:
    """Return the network that has exactly the names and shapes of a file's tensors.

    Args:
      naming: the framework's names.
      shapes: the file's tensors.
      name: the framework's name of the model, without the framework; if it is None, all models are tried.
      source: the file, for errors.
      drop: return the network without a classifier, and ignore tensors that it does not have, unless they lie in the
        same block as a layer of it. It has no hidden layer and no last 1x1 convolution either if the file lacks them.

    Raises:
      WeightsError: no network has these tensors, or several have; the message names the differences or the networks.
    """
    entries, width = naming.select(name) if name else (_find_closest(naming, shapes), None)
    fits, closest = [], (math.inf, f"{naming.framework}/{name}, a network that cannot be built")
    for entry in entries:
        for match in _candidates(naming, entry, shapes, width, drop=drop):
            expected = {name: slot.shape for name, slot in match.slots.items()}
            found = _leave_out_ends(shapes, expected) if drop else shapes
            count, differences = compare(expected, found)
            if not count:
                fits.append(match)
                break
            closest = min(closest, (count, f"{match.name}: {differences}"))
    if not fits:
        raise WeightsError(f"{source} does not fit {closest[1]}")
    most = max(len(match.slots) for match in fits)
    whole = [match for match in fits if len(match.slots) == most]
    # V1 without its last 1x1 is not another network than V1, but has the name of one.
    fits = [match for match in whole if match.spec.head or not match.lost_head] or whole
    if len(fits) > 1:
        raise WeightsError(
            f"{source} may be {' or '.join(match.name for match in fits)}: they have the same tensors, "
            "but another padding, epsilon of batch norm or fixed filter; give the name of one"
        )
    return fits[0]


def _leave_out_ends(shapes: Shapes, expected: Shapes) -> Shapes:
    """Return the tensors of the expected network, and unknown ones in the same block as one of them.

    A block is the first part of a name that is not the same in all expected names, as `features.3` or `layer`.
    """
    parts = {name: re.split(r"[./]", name) for name in (*shapes, *expected)}
    columns = zip(*(parts[name] for name in expected), strict=False)  # up to the end of the shortest name
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    blocks = {tuple(parts[name][: shared + 1]) for name in expected}
    return {name: shape for name, shape in shapes.items() if tuple(parts[name][: shared + 1]) in blocks}


def _find_closest(naming: Naming, shapes: Shapes) -> list[Entry]:
    """Return the entries whose tensors' names differ least from the file's; several if they tie."""

    def count_strangers(entry: Entry) -> int:
        spec = make_spec(entry.model, width=entry.width or 1.0, convention=entry.convention)
        return len(_list_names(naming, _fit_ends(naming, spec, shapes)) ^ shapes.keys())

    counts = [count_strangers(entry) for entry in naming.entries]
    return [entry for entry, count in zip(naming.entries, counts, strict=True) if count == min(counts)]


@functools.lru_cache(maxsize=128)  # every file of a framework is compared with the same networks
def _list_names(naming: Naming, spec: Spec) -> frozenset[str]:
    return frozenset(naming.list_slots(spec))


def _candidates(naming: Naming, entry: Entry, shapes: Shapes, width: float | None, *, drop: bool) -> Iterator[Match]:
    """Yield the entry's network, with the file's ends, at the given width or at all likely ones.

    The likely widths are the published ones, and then the one at which the number of elements agrees.
    """

    def make(width: float) -> Spec:
        spec = make_spec(entry.model, width=width, convention=entry.convention)
        return _fit_ends(naming, spec, shapes, drop=drop)

    def list_widths() -> Iterator[float]:
        yield from (width,) if width else _WIDTHS
        if not width:
            yield _search_width(naming, make, shapes)

    for candidate in list_widths():
        try:
            spec = make(candidate)
        except ValueError:  # groups that divide no channels of this width
            continue
        lost_head = spec.head is None and make_spec(entry.model, convention=entry.convention).head is not None
        yield Match(naming.name_entry(entry, candidate), entry, candidate, spec, naming.list_slots(spec), lost_head)


def align_by_order(naming: Naming, shapes: Shapes) -> Iterator[dict[str, str]]:
    """Yield {tensor's name: current name} for every network whose tensors have the same numbers of axes in this order.

    Keras reads its older files by order too: the names in its published files come from several of its versions.
    """
    for entry in naming.entries:
        spec = make_spec(entry.model, convention=entry.convention)
        for tail in (spec, replace(spec, num_classes=0), replace(spec, num_classes=0, hidden=0)):
            slots = naming.list_slots(tail)
            if [len(slot.shape) for slot in slots.values()] == [len(shape) for shape in shapes.values()]:
                yield dict(zip(shapes, slots, strict=True))


def _fit_ends(naming: Naming, spec: Spec, shapes: Shapes, *, drop: bool = False) -> Spec:
    """Return the spec with the file's input channels and classes, and without the last layers that the file lacks.

    With `drop` it has no classifier, and a hidden layer only if it is the file's.
    """
    layers = naming.name_layers(spec)
    kernels = {
        layer: shapes.get(layers[layer][0] + naming.leaves["kernel"])
        for layer in ("stem", "head", "hidden", "classifier")
        if layer in layers
    }
    layout, stem, classifier, hidden = naming.layout, kernels["stem"], kernels["classifier"], kernels["hidden"]
    if stem and len(stem) == 4 and stem[layout.conv[2]] > 0:
        spec = replace(spec, in_channels=stem[layout.conv[2]])
    if classifier and not drop:
        # The classifier of Keras' include_top=False and of other shortened networks sees the pooling.
        inputs = math.prod(classifier) // max(1, classifier[layout.outputs])
        if hidden is None and spec.head and spec.head.filters == inputs:
            spec = replace(spec, hidden=0)
        return replace(spec, num_classes=classifier[layout.outputs])
    if drop and spec.head and not kernels.get("head"):
        return replace(spec, num_classes=0, head=None, hidden=0)
    has_hidden = hidden is not None and (not drop or hidden[layout.outputs] == spec.hidden)
    return replace(spec, num_classes=0, hidden=spec.hidden if has_hidden else 0)


def _search_width(naming: Naming, make: Callable[[float], Spec], shapes: Shapes) -> float:
    """Return the width at which the network has as many elements as the file, found by bisection.

    Bisection works because no tensor shrinks when the width grows.
    """

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
    # Many widths give the same network; return the one with the fewest digits.
    return next((round(high, digits) for digits in (1, 2, 3) if not exceed(round(high, digits))), high)


def compare(expected: Shapes, found: Shapes) -> tuple[int, str]:
    """Return the number of tensors that differ, and a sentence that names the first ones of each kind."""
    groups = {
        "it lacks": [name for name in expected if name not in found],
        "it has unknown": [name for name in found if name not in expected],
        "of another shape are": [name for name, shape in expected.items() if found.get(name, shape) != shape],
    }

    def show(name: str) -> str:
        if expected.get(name) is None or found.get(name) is None:
            return printable(name)
        return f"{name} {list(found[name])[:9]} (valid: {list(expected[name])})"

    texts = [f"{what} {list_some(names, show)}" for what, names in groups.items() if names]
    return sum(map(len, groups.values())), "; ".join(texts)


def list_some(names: Collection[str], show: Callable[[str], str] = printable) -> str:
    """Return the first names as text, and how many more there are."""
    first = ", ".join(show(name) for name in itertools.islice(names, 4))
    return first + (f" and {len(names) - 4} more" if len(names) > 4 else "")
