"""Folders of Hugging Face: weights with config.json beside them, of transformers or of timm.

Sources: transformers 4.57 models/mobilenet_v1 and mobilenet_v2, configuration_*.py and image_processing_*.py; timm
1.0.31 models/_hub.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import HALF, Preprocessing

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_JSON_LIMIT = 10_000_000  # bytes
_MODELS = ("mobilenet_v1", "mobilenet_v2")
# The values of transformers' MobileNetV2 that its tables have here; they are its defaults.
_TABLE = {"first_layer_is_expansion": True, "expand_ratio": 6, "depth_divisible_by": 8, "min_depth": 8}
# Pillow's numbers of filters.
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Hints:
    """Facts about weights that their tensors do not tell."""

    name: str | None = None  # FRAMEWORK/MODEL
    preprocessing: Preprocessing | None = None
    class_names: list[str] | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # fields of the spec
    options: dict[str, Any] = field(default_factory=dict)  # of models/options.py


def find_weights(folder: Path) -> Path | None:
    """Return the file of weights in a folder of transformers or timm; None if it is no such folder."""
    files = [folder / name for name in WEIGHTS_FILES if (folder / name).is_file()]
    return files[0] if files and (folder / CONFIG).is_file() else None


def read_hints(folder: Path, *, label: str) -> Hints:
    """Return what the JSON files of a folder say; raise WeightsError, which calls the folder `label`, for other files.

    The names of classes are those of `id2label`, unless they are transformers' LABEL_0, LABEL_1, ...
    """
    config = _read_json(folder / CONFIG, label)
    try:
        if "model_type" not in config:
            return _read_timm(config)
        check_choice("its model_type", config["model_type"], _MODELS)
        path = folder / PREPROCESSOR
        return _read_transformers(config, _read_json(path, label) if path.is_file() else {})
    except KeyError as error:
        raise WeightsError(f"the config.json of {label} is not timm's: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise WeightsError(f"the config.json of {label} cannot be used: {error}") from error


def _read_json(path: Path, label: str) -> dict[str, Any]:
    if path.stat().st_size > _JSON_LIMIT:
        raise WeightsError(f"the {path.name} of {label} is larger than {_JSON_LIMIT:,} bytes")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the {path.name} of {label} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"the {path.name} of {label} is no JSON object")
    return content


def _read_timm(config: dict[str, Any]) -> Hints:
    given = config["pretrained_cfg"]
    preprocessing = Preprocessing(
        mean=tuple(255 * x for x in given["mean"]),  # pyright: ignore[reportArgumentType]
        std=tuple(255 * x for x in given["std"]),  # pyright: ignore[reportArgumentType]
        image_size=given["input_size"][-1],
        crop_share=given["crop_pct"],
        interpolation=given["interpolation"],
    )
    tag = f".{given['tag']}" if given.get("tag") else ""
    return Hints(f"timm/{config['architecture']}{tag}", preprocessing, _read_names(config.get("label_names")))


def _read_transformers(network: dict[str, Any], preprocessor: dict[str, Any]) -> Hints:
    labels = network.get("id2label") or {}
    names = [labels.get(str(i)) for i in range(len(labels))]
    is_named = bool(names) and not all(name == f"LABEL_{i}" for i, name in enumerate(names))
    changes = {
        "padding": "same" if network.get("tf_padding", True) else "symmetric",
        "bn_epsilon": float(network.get("layer_norm_eps", 1e-3)),
    }
    options = {"activation": network.get("hidden_act", "relu6")}
    check_choice("its hidden_act", options["activation"], ("relu6", "relu"))
    # With a coarse output, the last layer before the classifier is narrower than the table has it.
    table = {**_TABLE, **({"finegrained_output": True} if network.get("depth_multiplier", 1) < 1 else {})}
    for key, value in table.items() if network["model_type"] == "mobilenet_v2" else ():
        if network.get(key, value) != value:
            raise ValueError(f"its {key} is {network[key]!r}; valid: {value}")
    if network.get("output_stride", 32) != 32:
        options["output_stride"] = network["output_stride"]
    return Hints(
        f"transformers/{network['model_type']}",
        _read_preprocessor(preprocessor, size=network.get("image_size", 224)),
        _read_names(names) if is_named else None,
        changes,
        options,
    )


def _read_names(names: Any) -> list[str] | None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("its class names are no list of text")
    return names


def _read_preprocessor(given: dict[str, Any], *, size: int) -> Preprocessing:
    """Return the preprocessing of an image processor; the defaults are those of its class."""
    if not given:
        return Preprocessing(HALF.mean, HALF.std, image_size=size)
    resize, crop = given.get("size", {"shortest_edge": 256}), given.get("crop_size", 224)
    crop = crop if isinstance(crop, int) else crop["height"]
    squash = isinstance(resize, dict) and "shortest_edge" not in resize
    edge = resize if isinstance(resize, int) else resize["height"] if squash else resize["shortest_edge"]
    if not given.get("do_center_crop", True):
        crop = edge
    if not given.get("do_resize", True):
        edge = crop
    scale = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    is_normal = given.get("do_normalize", True)
    mean, std = (given.get(key, [0.5] * 3) if is_normal else default for key, default in _NORMAL)
    return Preprocessing(
        mean=tuple(x / scale for x in mean),  # pyright: ignore[reportArgumentType]
        std=tuple(x / scale for x in std),  # pyright: ignore[reportArgumentType]
        image_size=crop,
        crop_share=crop / edge,
        interpolation=_RESAMPLE.get(given.get("resample", 2), f"number {given.get('resample')}"),
        squash=squash,
    )


_NORMAL = (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
