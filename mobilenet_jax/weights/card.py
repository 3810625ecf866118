"""The card that travels with weights: plain JSON that says how to use them and where they come from."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.spec_json import from_json, to_json
from mobilenet_jax.weights import WeightsError


@dataclass(frozen=True)
class Preprocessing:
    """How an image is prepared: resize to image_size / crop_share, crop the centre, (x - mean) / std.

    Keys and units are those of a config's data section: pixels, and grey levels from 0 to 255. Raises ValueError for an
    impossible value.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int = 224
    crop_share: float = 0.875
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self):
        for key in ("mean", "std"):
            object.__setattr__(self, key, tuple(float(level) for level in getattr(self, key)))
        rules = {
            "mean": len(self.mean) == 3 and all(map(math.isfinite, self.mean)),
            "std": len(self.std) == 3 and all(0 < level < math.inf for level in self.std),
            "image_size": type(self.image_size) is int and 1 <= self.image_size <= _LARGEST,
            "crop_share": 0.1 <= self.crop_share <= 1,
            "interpolation": self.interpolation in ("nearest", "bilinear", "bicubic"),
            "squash": type(self.squash) is bool,
        }
        for key, valid in rules.items():
            if not valid:
                raise ValueError(f"its preprocessing has {key} {getattr(self, key)!r}")


_TEXT_LIMIT = 2_000  # characters of a name, a class or a note
_LARGEST = 2048  # pixels; the largest published MobileNet takes 544
# mean .485 .456 .406, std .229 .224 .225 of x / 255
IMAGENET = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# x / 127.5 - 1
HALF = Preprocessing((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
# Keras' preprocess_input after load_img(path, target_size=(224, 224)), as in the examples of its applications
KERAS_EXAMPLE = replace(HALF, crop_share=1.0, interpolation="nearest", squash=True)


def make_card(
    *,
    name: str,
    model: str,
    width: float,
    convention: str,
    spec: Spec,
    preprocessing: Preprocessing,
    class_names: list[str] | None,
    source: dict[str, str],
    metrics: dict[str, float] | None = None,
    notes: list[str] | None = None,
) -> dict:
    """Return the card as plain data.

    Args:
      name: the foreign model's name, or the run's.
      model: the network, as `width` and `convention` an argument of `create_model`.
      width: see `model`.
      convention: see `model`.
      spec: the network, resolved.
      preprocessing: how images are prepared.
      class_names: the classes in order; None if they have no names.
      source: {"file", "sha256"}.
      metrics: under the names that a run writes.
      notes: what was changed when the weights were read.
    """
    fields = dataclasses.asdict(preprocessing)
    return {
        "name": name,
        "model": model,
        "width": width,
        "convention": convention,
        "spec": to_json(spec),
        "preprocessing": {**fields, "mean": list(preprocessing.mean), "std": list(preprocessing.std)},
        "class_names": class_names,
        "source": source,
        "metrics": metrics or {},
        "notes": notes or [],
    }


_TYPES = {
    "name": str,
    "model": str,
    "width": int | float,
    "convention": str,
    "spec": dict,
    "preprocessing": dict,
    "class_names": list | None,
    "source": dict,
    "metrics": dict,
    "notes": list,
}


def check_card(card: object, *, source: str) -> Spec:
    """Return the spec of a card; raise WeightsError if a key is missing or has another type.

    Keys of the preprocessing that an older card lacks are added with their defaults.
    """
    if not isinstance(card, dict):
        raise WeightsError(f"the card of {source} is no JSON object")
    for key, kind in _TYPES.items():
        if key not in card or not isinstance(card[key], kind):
            raise WeightsError(f"the card of {source} has no valid {key!r}")
    try:
        spec = from_json(card["spec"])
    except ValueError as error:
        raise WeightsError(f"the card of {source} holds no network: {error}") from error
    card["preprocessing"] = dataclasses.asdict(read_preprocessing(card, source=source)) | card["preprocessing"]
    names = card["class_names"]
    if names is not None and len(names) != spec.num_classes:
        raise WeightsError(f"the card of {source} has {len(names)} class names for {spec.num_classes} classes")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise WeightsError(f"the card of {source} has class names that are no text")
    for text in (card["name"], *(names or ()), *card["notes"]):  # terminals obey control characters
        if not (isinstance(text, str) and len(text) <= _TEXT_LIMIT and text.isprintable()):
            raise WeightsError(
                f"the card of {source} has text with control characters or of more than {_TEXT_LIMIT:,} characters"
            )
    return spec


def read_preprocessing(card: dict, *, source: str) -> Preprocessing:
    """Return the preprocessing of a card; raise WeightsError for a missing or impossible value."""
    try:
        return Preprocessing(**card["preprocessing"])
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"the card of {source}: {error}") from error


def format_card(card: dict, *, path: str) -> str:
    """Return a page in Markdown about the weights in the file `path`: network, preprocessing, classes, metrics."""
    spec, given = check_card(card, source=path), read_preprocessing(card, source=path)
    cost, size = compute_cost(spec, given.image_size), given.image_size
    levels = [", ".join(f"{level:g}" for level in triple) for triple in (given.mean, given.std)]
    side = "both sides have" if given.squash else "the shorter side has"
    how = f"resized ({given.interpolation}) so that {side} {int(size / given.crop_share + 1e-6)} px, centre cropped"
    rows = {
        "network": f"`{card['model']}`, width {card['width']:g}, convention `{card['convention']}`",
        "parameters": f"{cost.params:,}",
        "multiply-adds": f"{cost.madds + cost.attention_madds:,}",
        "input": f"RGB, {size}x{size} px: {how}",
        "normalisation": f"(x - mean) / std in grey levels from 0 to 255; mean {levels[0]}; std {levels[1]}",
        "classes": ", ".join(card["class_names"] or [f"{spec.num_classes}, without names"]),
        "source": f"{card['source'].get('file', 'not stated')}, SHA-256 `{card['source'].get('sha256', 'not stated')}`",
        **{f"`{name}`": f"{value:.6g}" for name, value in card["metrics"].items()},
        **{f"note {i}": note for i, note in enumerate(card["notes"], start=1)},
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    example = (
        f'```python\nfrom mobilenet_jax import load_weights\n\nmodel, variables, card = load_weights("{path}")\n```'
    )
    return f"# {card['name']}\n\n| | |\n|---|---|\n{table}\n\n{example}\n"


def read_imagenet_classes() -> list[str]:
    """Return the 1,000 names in the order of the classes, as in torchvision's weights."""
    return (Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines()


def hash_variables(variables: dict) -> str:
    """Return the SHA-256, in hexadecimal digits, of the values of a tree of arrays."""
    from flax import traverse_util  # here, because an exported file needs a card and no Flax

    digest = hashlib.sha256()
    for leaf in traverse_util.flatten_dict(variables).values():
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
