"""Weights of any kind -> (model, variables, card): files of torchvision, timm and Keras, our own files, our runs."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util
from safetensors import safe_open

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.paths import as_path, check_reachable, is_bucket
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import (
    Preprocessing,
    check_card,
    hash_file,
    hash_variables,
    make_card,
    read_imagenet_classes,
)
from mobilenet_jax.weights.fetch import fetch, is_remote
from mobilenet_jax.weights.hdf5 import read_hdf5
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.naming import Match, Naming, align_by_order, compare, identify
from mobilenet_jax.weights.pth import read_pth
from mobilenet_jax.weights.torch_names import PUBLISHED_PREPROCESSING, TIMM, TORCHVISION
from mobilenet_jax.workdir.checkpoint import load_variables
from mobilenet_jax.workdir.metrics import METRICS_FILE, read_metrics

CARD_KEY = "mobilenet_jax_card"  # in the metadata of a safetensors file
NAMINGS = {naming.framework: naming for naming in (TORCHVISION, TIMM, KERAS)}
_BYTES_LIMIT = 320_000_000  # twice the size of the largest MobileNet, V4-Hybrid-Large with 151 MB in float32
_HEADER_LIMIT = 8_000_000  # bytes of a safetensors header; the header of a MobileNet has 100,000
_COUNTERS = ".num_batches_tracked"  # PyTorch's count of training steps, one for each norm
_BACKGROUND = 1001  # classes of TensorFlow's ImageNet weights; the first is the background

Tensors = Mapping[str, np.ndarray]


def load_weights(
    path_or_name: str | os.PathLike,
    name: str | None = None,
    *,
    lowering: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
) -> tuple[MobileNet, dict, dict]:
    """Return (model, {"params", "batch_stats"}, card). Every tensor is used and every variable is filled.

    Variables are float32 NumPy arrays; the card is JSON (see `card.py`).

    Args:
      path_or_name: a file (.pth, .safetensors, .h5, .weights.h5, .keras), the workdir or a checkpoint of a run, each
        also in a bucket (gs://..., s3://...), or a name to download: `torchvision/mobilenet_v2`,
        `keras/MobileNetV2_035`, `hf:timm/mobilenetv2_100.ra_in1k`.
      name: the model in a file of another framework, as `timm/tf_mobilenetv3_large_100`. It is needed if several models
        have the same tensors. Keras' models are taken to be built for a known input size.
      lowering: see `create_model`.
      dtype: see `create_model`.
      offline: use what was downloaded before, without a network.

    Raises:
      WeightsError: the file cannot be read, fits no model, or fits several. The message is one sentence.
      FileNotFoundError: there is no such file, workdir or name.
    """
    options: dict[str, Any] = {"lowering": lowering, "dtype": dtype}
    path, preprocessing = as_path(path_or_name), None
    check_reachable(path)
    if is_remote(path_or_name) and not path.exists():
        fetched, name, preprocessing = fetch(str(path_or_name), offline=offline)
        path = epath.Path(fetched)
    if path.is_dir():
        return _load_run(path, options)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights {path_or_name}; valid: a file, the workdir of a run, or a name as "
            "torchvision/mobilenet_v2, keras/MobileNetV2, hf:timm/mobilenetv2_100.ra_in1k"
        )
    with _localise(path) as file:
        return _load_file(file, name, preprocessing, options)


@contextlib.contextmanager
def _localise(path: epath.Path) -> Iterator[Path]:
    """Give a local path of a file; a file in a bucket is copied to a temporary folder, as its readers need a disk."""
    if not is_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        size = path.stat().length
        if size > _BYTES_LIMIT:
            raise WeightsError(f"{path} has {size:,} bytes; no MobileNet has more than {_BYTES_LIMIT:,}")
        local.write_bytes(path.read_bytes())
        yield local


def _load_file(
    path: Path, name: str | None, preprocessing: Preprocessing | None, options: dict[str, Any]
) -> tuple[MobileNet, dict, dict]:
    tensors, metadata = read_tensors(path)
    if CARD_KEY in metadata:
        spec, card = _read_card(metadata[CARD_KEY], path)
        variables = _fill_own(spec, tensors, path)
    else:
        spec, variables, card = _load_foreign(tensors, name, path, preprocessing)
    return MobileNet(spec, **options), variables, card


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return ({name: array}, metadata) of a file in the format of its suffix; nothing in it is executed.

    Raises WeightsError, with one sentence, for a file that cannot be read.
    """
    readers = {"pth": read_pth, "pt": read_pth, "bin": read_pth, "h5": read_hdf5, "hdf5": read_hdf5, "keras": read_hdf5}
    suffix = path.suffix.removeprefix(".")
    if suffix != "safetensors" and suffix not in readers:
        raise WeightsError(f"{path} has no known format; valid suffixes: safetensors, {', '.join(readers)}")
    if path.stat().st_size > _BYTES_LIMIT:
        raise WeightsError(f"{path} has {path.stat().st_size:,} bytes; no MobileNet has more than {_BYTES_LIMIT:,}")
    try:
        return _read_safetensors(path) if suffix == "safetensors" else (readers[suffix](path), {})
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # zipfile, safetensors and pickle raise many kinds for a damaged file
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise WeightsError(f"{path} cannot be read, it is damaged or not a {suffix} file: {said}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(_HEADER_LIMIT, path.stat().st_size):
        raise WeightsError(f"its header of {length:,} bytes is larger than that of any MobileNet, or than the file")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_card(text: str, path: Path) -> tuple[Spec, dict]:
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the card of {path} is no JSON: {error}") from error
    return check_card(card, source=str(path)), card


def _fill_own(spec: Spec, tensors: Tensors, path: Path) -> dict:
    shapes = {"/".join(place): shape for place, shape in variable_shapes(spec).items()}
    count, differences = compare(shapes, {name: tensor.shape for name, tensor in tensors.items()})
    if count:
        raise WeightsError(f"{path} does not fit the network of its card: {differences}")
    return traverse_util.unflatten_dict({name: _to_float32(name, tensors[name], path) for name in shapes}, sep="/")


def _load_foreign(
    tensors: Tensors, name: str | None, path: Path, preprocessing: Preprocessing | None
) -> tuple[Spec, dict, dict]:
    """Return (spec, variables, card) of another framework's tensors.

    `preprocessing` replaces the model's usual one if it is given.
    """
    match, tensors = recognise(tensors, name, source=str(path))
    flat = {slot.path: slot.to_variable(_to_float32(n, tensors[n], path)) for n, slot in match.slots.items()}
    spec, notes = match.spec, []
    if spec.num_classes == _BACKGROUND:
        notes.append(f"class 0 of {_BACKGROUND}, the background, was dropped")
        logging.warning("%s: %s", path, notes[0])
        spec = replace(spec, num_classes=_BACKGROUND - 1)
        for leaf in ("kernel", "bias"):
            flat["params", "classifier", leaf] = flat["params", "classifier", leaf][..., 1:]
    sha256 = hash_file(path)
    usual = PUBLISHED_PREPROCESSING.get(match.name, match.entry.preprocessing)
    usual = PUBLISHED_PREPROCESSING.get(sha256[:8], usual)
    card = make_card(
        name=name or match.name,
        model=match.entry.model,
        width=match.width,
        convention=match.entry.convention,
        spec=spec,
        preprocessing=preprocessing or usual,
        class_names=read_imagenet_classes() if spec.num_classes == 1000 else None,
        source={"file": path.name, "sha256": sha256},
        notes=notes,
    )
    return spec, traverse_util.unflatten_dict({p: np.ascontiguousarray(leaf) for p, leaf in flat.items()}), card


def recognise(tensors: Tensors, name: str | None, *, source: str) -> tuple[Match, Tensors]:
    """Return (the network, tensors under current names) of a foreign file; raise WeightsError if no network fits.

    Old names, which some Keras files have, are replaced by the current ones.
    """
    tensors = {n: tensor for n, tensor in tensors.items() if not n.endswith(_COUNTERS)}
    shapes = {n: tensor.shape for n, tensor in tensors.items()}
    naming, model = _select_naming(shapes, name, source)
    try:
        return identify(naming, shapes, name=model, source=source), tensors
    except WeightsError:
        for names in align_by_order(naming, shapes) if naming is KERAS else ():
            renamed = {new: tensors[old] for old, new in names.items()}
            try:
                match = identify(naming, {n: t.shape for n, t in renamed.items()}, name=model, source=source)
            except WeightsError:
                continue
            return match, renamed
        raise


def _select_naming(shapes: Mapping[str, tuple[int, ...]], name: str | None, source: str) -> tuple[Naming, str | None]:
    if name is not None:
        framework, _, model = name.partition("/")
        if framework not in NAMINGS or not model:
            raise WeightsError(f"name is {name!r}; valid: FRAMEWORK/MODEL, the framework of {', '.join(NAMINGS)}")
        return NAMINGS[framework], model
    if shapes and all("/" in n for n in shapes):
        return KERAS, None
    for start, naming in (("features.", TORCHVISION), ("blocks.", TIMM)):
        if any(n.startswith(start) for n in shapes):
            return naming, None
    known, some = ", ".join(NAMINGS), ", ".join(list(shapes)[:4]) or "none"
    raise WeightsError(f"{source} holds no MobileNet of {known}; its tensors: {some}")


def _to_float32(name: str, tensor: np.ndarray, path: Path) -> np.ndarray:
    if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise WeightsError(f"{name} of {path} is {tensor.dtype}; valid: float16, bfloat16, float32, float64")
    with np.errstate(over="ignore"):
        values = np.asarray(tensor, np.float32)
    is_variance = name.endswith(("running_var", "moving_variance", "norm/var"))
    if not np.isfinite(values).all() or (is_variance and (values < 0).any()):
        raise WeightsError(f"{name} of {path} has values that are not finite, or a variance below 0")
    return values


def _load_run(path: epath.Path, options: dict[str, Any]) -> tuple[MobileNet, dict, dict]:
    """Load the newest checkpoint of a workdir, or the one that `path` names; its config gives the card."""
    try:
        variables, meta = load_variables(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    config = meta["config"]
    section = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    model = create_model(**{**section, "stride_one": tuple(section["stride_one"]), **options})
    # The config of an older run may lack a key, whose default then held.
    given = {f.name: config[f"data.{f.name}"] for f in fields(Preprocessing) if f"data.{f.name}" in config}
    card = make_card(
        name=config["name"],
        model=section["name"],
        width=section["width"],
        convention=section["convention"],
        spec=model.spec,
        preprocessing=Preprocessing(**given),
        class_names=meta["class_names"] if len(meta["class_names"]) == model.spec.num_classes else None,
        source={"file": f"{path.name}, step {meta['step']}", "sha256": hash_variables(variables)},
        metrics=_read_evaluation(path, meta["step"]),
    )
    return model, variables, card


def _read_evaluation(workdir: epath.Path, step: int) -> dict:
    """Return the metrics of the run's evaluation at a step; empty if it did not evaluate then."""
    if not (workdir / METRICS_FILE).exists():
        return {}
    lines = [line for line in read_metrics(workdir) if line["step"] == step]
    return {key: value for line in lines for key, value in line.items() if key.startswith("eval")}
