"""Weights of any kind -> (model, variables, card): files of other frameworks, our own files, our runs."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import Spec, check_choice
from mobilenet_jax.paths import as_path, check_reachable, is_bucket
from mobilenet_jax.weights import CLASSIFIERS, WeightsError, printable
from mobilenet_jax.weights.card import (
    Preprocessing,
    check_card,
    hash_file,
    hash_variables,
    make_card,
    read_preprocessing,
)
from mobilenet_jax.weights.fetch import fetch, is_remote
from mobilenet_jax.weights.folder import Hints, find_weights, read_hints
from mobilenet_jax.weights.foreign import (
    CARD_SUFFIX,
    Source,
    adapt,
    fill_own,
    load_foreign,
    load_with_card,
    read_card_beside,
)
from mobilenet_jax.weights.read import BYTES_LIMIT, Contents, read_contents
from mobilenet_jax.weights.recognise import find_states
from mobilenet_jax.workdir.metrics import METRICS_FILE, read_metrics

CARD_KEY = "mobilenet_jax_card"  # in the metadata of a safetensors file
_EXAMPLES = (
    "torchvision/mobilenet_v2, keras/MobileNetV2, hf:timm/mobilenetv2_100.ra_in1k, hf:google/mobilenet_v2_1.0_224"
)


def load_weights(
    path_or_name: str | os.PathLike | Mapping[str, Any],
    name: str | None = None,
    *,
    lowering: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    select: str | None = None,
    classifier: str = "keep",
    in_channels: int | None = None,
) -> tuple[MobileNet, dict, dict]:
    """Return (model, {"params", "batch_stats"}, card). Every variable is filled, and every tensor is used or named.

    Variables are float32 NumPy arrays; the card is JSON (see `card.py`). What was chosen or left out is logged, and is
    in the card's notes.

    Args:
      path_or_name: a file of PyTorch, Keras or TensorFlow-Slim (docs/weights.md lists the forms) or of this package;
        the workdir or a checkpoint of a run; each also in a bucket (gs://..., s3://...). A folder of transformers or
        timm. A name to download: `torchvision/mobilenet_v2`, `keras/MobileNetV2_035`,
        `hf:google/mobilenet_v2_1.0_224`. Or a dict of arrays, such as a state dict.
      name: the model in a file of another framework, as `timm/tf_mobilenetv3_large_100`. It is needed if several models
        have the same tensors. Keras' models are taken to be built for a known input size.
      lowering: see `create_model`.
      dtype: see `create_model`.
      offline: use what was downloaded before, without a network.
      select: which network of a checkpoint that has several, as `state_dict`. Without it, averaged weights (EMA) are
        taken if there are some.
      classifier: "keep", or "drop" for the network without the layers behind the pooling, whatever the file has there.
      in_channels: the number of input channels. If the file has another one, the kernel of the stem is summed over its
        channels and shared among the new ones. None needs a network for RGB in a file of another framework.

    Raises:
      WeightsError: the file cannot be read, fits no model, or fits several. The message is one sentence.
      FileNotFoundError: there is no such file, workdir or name.
      ValueError: an impossible argument.
    """
    check_choice("classifier", classifier, CLASSIFIERS)
    options: dict[str, Any] = {"lowering": lowering, "dtype": dtype}
    asked: dict[str, Any] = {"select": select, "classifier": classifier, "in_channels": in_channels}
    if isinstance(path_or_name, Mapping):
        source = Source("the dict", "a dict of arrays", lambda: _hash_arrays(path_or_name), Hints(name), **asked)
        spec, variables, card = load_foreign(Contents(path_or_name, _to_arrays, {}), source)
        return MobileNet(spec, **options), variables, card
    path, hints = as_path(path_or_name), Hints(name)
    check_reachable(path)
    if is_remote(path_or_name) and not path.exists():
        fetched, hints = fetch(str(path_or_name), offline=offline, check=check_loads)
        path = epath.Path(fetched)
        hints = replace(hints, name=name or hints.name)
    if path.is_dir():
        weights = None if is_bucket(path) else find_weights(Path(path))
        if weights is None and (path / "saved_model.pb").exists():
            raise WeightsError(f"{path} is a TensorFlow SavedModel; valid: the model saved as .keras or .h5")
        if weights is None:
            spec, variables, card = adapt(*_load_run(path), Source(str(path), path.name, str, **asked))
            return MobileNet(spec, **options), variables, card
        hints = read_hints(Path(path), label=str(path))
        path, hints = epath.Path(weights), replace(hints, name=name or hints.name)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no weights {path_or_name}; valid: a file, the workdir of a run, or a name as {_EXAMPLES}"
        )
    with _localise(path) as file:
        source = Source(str(file), file.name, lambda: hash_file(file), hints, **asked)
        spec, variables, card = _load_file(file, source)
    return MobileNet(spec, **options), variables, card


@contextlib.contextmanager
def _localise(path: epath.Path) -> Iterator[Path]:
    """Give a local path of a file; a file in a bucket is copied to a temporary folder, as its readers need a disk."""
    if not is_bucket(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in (path, path.with_name(path.name + CARD_SUFFIX)):
            if part != path and not part.exists():
                continue
            size = part.stat().length
            if size > BYTES_LIMIT:
                raise WeightsError(f"{part} has {size:,} bytes; no MobileNet has more than {BYTES_LIMIT:,}")
            (Path(folder) / part.name).write_bytes(part.read_bytes())
        yield Path(folder) / path.name


def _load_file(path: Path, source: Source) -> tuple[Spec, dict, dict]:
    contents = read_contents(path)
    if CARD_KEY in contents.metadata:
        spec, card = _read_card(contents.metadata[CARD_KEY], path)
        return adapt(spec, fill_own(spec, contents.load(contents.tree), source.label), card, source)
    card = read_card_beside(path)
    if card is None:
        return load_foreign(contents, source)
    if source.hints.name is None:
        return adapt(*load_with_card(contents, card, source), source)
    check_card(card, source=source.label)
    known = {"preprocessing": read_preprocessing(card, source=source.label), "class_names": card["class_names"]}
    return load_foreign(contents, replace(source, hints=replace(source.hints, **known)))


def check_loads(path: Path, name: str) -> None:
    """Raise WeightsError if a file cannot be loaded."""
    load_foreign(read_contents(path), Source(str(path), path.name, lambda: "", Hints(name)))


def _to_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return NumPy arrays; raise WeightsError for what NumPy cannot read."""
    arrays = {}
    for name, tensor in tensors.items():
        try:
            arrays[name] = np.asarray(tensor)
        except Exception as error:  # each framework raises its own kinds
            said = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise WeightsError(f"{printable(name)} of the dict is no array: {said}") from error
    return arrays


def _hash_arrays(tree: Any) -> str:
    """Return the SHA-256 of the numbers of a tree of arrays, in the order of the tree."""
    digest = hashlib.sha256()
    for tensors in find_states(tree).values():
        for array in _to_arrays(tensors).values():
            digest.update(array.tobytes())  # some types of numbers have no buffer
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return ({name: array}, metadata) of a file that is one dict of tensors; nothing in it is executed.

    Raises WeightsError, with one sentence, for a file that cannot be read.
    """
    contents = read_contents(path)
    tensors = find_states(contents.tree).get("")
    if tensors is None:
        raise WeightsError(f"{path} holds no tensors by name at its top")
    return contents.load(tensors), contents.metadata


def _read_card(text: str, path: Path) -> tuple[Spec, dict]:
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the card of {path} is no JSON: {error}") from error
    return check_card(card, source=str(path)), card


def _load_run(path: epath.Path) -> tuple[Spec, dict, dict]:
    """Load the newest checkpoint of a workdir, or the one that `path` names; its config gives the card."""
    from mobilenet_jax.workdir.checkpoint import load_variables  # here, because Orbax and Grain take half a second

    try:
        variables, meta = load_variables(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    config = meta["config"]
    section = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    spec = create_model(**{**section, "stride_one": tuple(section["stride_one"])}).spec
    # The config of an older run may lack a key, whose default then held.
    given = {f.name: config[f"data.{f.name}"] for f in fields(Preprocessing) if f"data.{f.name}" in config}
    card = make_card(
        name=config["name"],
        model=section["name"],
        width=section["width"],
        convention=section["convention"],
        spec=spec,
        preprocessing=Preprocessing(**given),
        class_names=meta["class_names"] if len(meta["class_names"]) == spec.num_classes else None,
        source={"file": f"{path.name}, step {meta['step']}", "sha256": hash_variables(variables)},
        metrics=_read_evaluation(path, meta["step"]),
    )
    return spec, variables, card


def _read_evaluation(workdir: epath.Path, step: int) -> dict:
    """Return the metrics of the run's evaluation at a step; empty if it did not evaluate then."""
    if not (workdir / METRICS_FILE).exists():
        return {}
    lines = [line for line in read_metrics(workdir) if line["step"] == step]
    return {key: value for line in lines for key, value in line.items() if key.startswith("eval")}
