"""The card that travels with weights: plain JSON, what must be known to use them and where they come from."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.spec_json import from_json, to_json
from mobilenet_jax.weights import WeightsError


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through: resize to image_size / crop_share, crop the centre, (x - mean) / std.

    Keys and units are those of a config's data section: pixels, and grey levels 0..255. Raises ValueError for a value
    that cannot be.
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


_LARGEST = 2048  # pixels; the largest published MobileNet takes 544
# mean .485 .456 .406, std .229 .224 .225 of x / 255
IMAGENET = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# x / 127.5 - 1
HALF = Preprocessing((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
# Keras' preprocess_input after load_img(path, target_size=(224, 224)), as its applications' examples have it
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
    """The card as plain data.

    `name` is that of the foreign model, or of the run; `model`, `width` and `convention` are what `create_model` takes;
    `source` is {"file", "sha256"}; `metrics` as a run writes them; `notes` say what was changed on the way.
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
    """The spec of a card; WeightsError where something is missing or of another type.

    A card from before a key of the preprocessing was there gets that key's default.
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
    return spec


def read_preprocessing(card: dict, *, source: str) -> Preprocessing:
    """The preprocessing of a card; WeightsError where a value is missing or cannot be."""
    try:
        return Preprocessing(**card["preprocessing"])
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"the card of {source}: {error}") from error


def read_imagenet_classes() -> list[str]:
    """The 1,000 names in the order of the classes, as torchvision's weights carry them."""
    return (Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
