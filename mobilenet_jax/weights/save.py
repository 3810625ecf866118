"""Weights to a file: our own safetensors with the card inside, or a state dict of torchvision or timm."""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import save

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Spec, check_choice
from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.paths import as_path
from mobilenet_jax.weights import FORMATS, WeightsError
from mobilenet_jax.weights.card import check_card
from mobilenet_jax.weights.foreign import BELONGS_TO, CARD_SUFFIX
from mobilenet_jax.weights.load import CARD_KEY
from mobilenet_jax.weights.naming import Naming, compare
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION
from mobilenet_jax.workdir.files import write_atomic, write_json_atomic

_EXPORTS = {"torchvision": TORCHVISION, "timm": TIMM}
# The keys of a spec that inference does not depend on.
_TRAINING = ("dropout", "drop_path", "init", "slim_stddev", "bn_decay")


def save_weights(
    path: str | os.PathLike,
    model: MobileNet,
    variables: Mapping,
    card: dict,
    *,
    format: str = "safetensors",  # noqa: A002
) -> epath.Path | None:
    """Write {"params", "batch_stats"} of a model; the file appears whole or not at all.

    A file of torchvision or timm cannot hold the card. It is written beside the file, as FILE.card.json, where
    `load_weights` finds it; the path of that is returned.

    Args:
      path: a `.safetensors` file, which may lie in a bucket; for the formats torchvision and timm also `.pth`, a
        state dict as of torch.save.
      model: the network. Its spec is written into the card.
      variables: {"params", "batch_stats"}.
      card: the card of `load_weights` or `make_card`.
      format: safetensors is our own, with the card; torchvision and timm are for their load_state_dict.

    Raises:
      WeightsError: the variables or the card do not fit the model, or the framework has no such network.
    """
    path = as_path(path)
    check_choice("format", format, FORMATS)
    suffixes = (".safetensors",) if format == "safetensors" else (".safetensors", ".pth")
    if path.suffix not in suffixes:
        raise WeightsError(f"{path} cannot be of format {format}; valid suffixes: {', '.join(suffixes)}")
    card = {**card, "spec": to_json(model.spec)}
    check_card(card, source="these weights")
    flat = {
        name: np.asarray(leaf, np.float32)
        for name, leaf in traverse_util.flatten_dict(dict(variables), sep="/").items()
    }
    shapes = {"/".join(place): shape for place, shape in variable_shapes(model.spec).items()}
    count, differences = compare(shapes, {name: leaf.shape for name, leaf in flat.items()})
    if count:
        raise WeightsError(f"the variables do not fit the model: {differences}")
    if format == "safetensors":
        write_atomic(path, save(flat, {CARD_KEY: json.dumps(card)}))
        return None
    tensors = _to_state_dict(_EXPORTS[format], model.spec, flat, card)
    content = _to_pth(tensors) if path.suffix == ".pth" else save(tensors, {"format": "pt"})
    beside = path.with_name(path.name + CARD_SUFFIX)
    beside.unlink(missing_ok=True)  # a card is never beside a file of which it does not speak
    write_atomic(path, content)
    write_json_atomic(beside, {**card, BELONGS_TO: hashlib.sha256(content).hexdigest()})
    return beside


def _to_state_dict(naming: Naming, spec: Spec, flat: Mapping[str, np.ndarray], card: dict) -> dict[str, np.ndarray]:
    """Return the framework's tensors; raise WeightsError if its model of that name would compute something else."""
    valid = [
        entry for entry in naming.entries if (entry.model, entry.convention) == (card["model"], card["convention"])
    ]
    if not valid:
        known = ", ".join(f"{entry.model} of convention {entry.convention}" for entry in naming.entries)
        raise WeightsError(
            f"{naming.framework} has no {card['model']} of convention {card['convention']}; valid: {known}"
        )
    built = make_spec(card["model"], width=card["width"], num_classes=spec.num_classes, convention=card["convention"])
    ours, theirs = ({k: v for k, v in to_json(s).items() if k not in _TRAINING} for s in (spec, built))
    if changed := [key for key in ours if ours[key] != theirs[key]]:
        raise WeightsError(
            f"{naming.framework}'s {valid[0].name} is another network than this one: its {', '.join(changed)} differ"
        )
    tensors = {}
    for name, slot in naming.list_slots(spec).items():
        tensors[name] = np.ascontiguousarray(slot.to_tensor(flat["/".join(slot.path)]))
        if name.endswith(naming.leaves["norm/var"]):
            counter = name.removesuffix(naming.leaves["norm/var"]) + ".num_batches_tracked"
            tensors[counter] = np.zeros((), np.int64)
    return tensors


def _to_pth(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the zip of torch.save: a pickle that describes the tensors, and their storages."""
    pickle = [b"\x80\x02}("]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (name, tensor) in enumerate(tensors.items()):
            kind = {"float32": "Float", "int64": "Long"}[tensor.dtype.name]
            strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
            pickle += [
                _pickle_string(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                _pickle_string("storage"),
                f"ctorch\n{kind}Storage\n".encode(),
                _pickle_string(str(i)),
                _pickle_string("cpu"),
                _pickle_integers(tensor.size),
                b"tQ",
                _pickle_integers(0),
                b"(" + _pickle_integers(*tensor.shape) + b"t",
                b"(" + _pickle_integers(*strides) + b"t",
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
            archive.writestr(f"archive/data/{i}", tensor.astype(tensor.dtype.newbyteorder("<")).tobytes())
        archive.writestr("archive/data.pkl", b"".join([*pickle, b"u."]))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _pickle_string(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _pickle_integers(*values: int) -> bytes:
    return b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values)
