"""The contract of an exported file: what goes in, what comes out, and the card of the weights, as JSON.

It is embedded in every .tflite and .onnx file and written beside each export. It also has the SHA-256 of the file in
which the digest itself is zeros: a damaged file is recognised before a runtime, which may crash on it, sees it.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass

from mobilenet_jax.exporting.graph import PIXELS, Graph
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.paths import as_path
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import check_card, read_preprocessing

KEY = "mobilenet_jax_export"  # of the contract in the file, and of the version in the contract
SUFFIXES = (".tflite", ".onnx")  # of the files that carry a contract
_VERSION = 1
_START = f'{{"{KEY}": {_VERSION}, "sha256": "'.encode()
_ZEROS = b"0" * 64
_LARGEST = 400_000_000  # bytes; the largest MobileNet has 151 MB in float32


@dataclass(frozen=True)
class Exported:
    """An exported file that is whole."""

    data: bytes
    contract: dict
    spec: Spec
    kind: str  # tflite | onnx

    @property
    def card(self) -> dict:
        """The card of the weights; a file that takes pixels normalises them itself, so it has mean 0 and std 1."""
        return self.contract["card"]


def make_contract(graph: Graph, card: dict, *, batch: int | None, quantize: str) -> str:
    """Return the contract as a line of JSON; its digest is still zeros.

    Args:
      graph: what the file computes.
      card: of the weights, with the image size of the graph.
      batch: the number of images at once; None: any.
      quantize: none | int8 | float16.
    """
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    size = given.image_size
    side = "both sides have" if given.squash else "the shorter side has"
    takes_pixels = graph.input == PIXELS
    if takes_pixels:
        preprocessing = {**card["preprocessing"], "mean": [0.0] * 3, "std": [1.0] * 3}
        card = {**card, "preprocessing": preprocessing}
    values = "grey levels from 0 to 255" if takes_pixels else "(grey level - mean) / std, grey levels from 0 to 255"
    contract = {
        KEY: _VERSION,
        "sha256": _ZEROS.decode(),
        "quantize": quantize,
        "input": {
            "name": graph.input,
            "shape": [batch, *graph.input_shape],
            "layout": "batch, height, width, channels",
            "channels": "RGB",
            "values": values,
            "mean": card["preprocessing"]["mean"],
            "std": card["preprocessing"]["std"],
            "resize": f"so that {side} {math.floor(size / given.crop_share + 1e-6)} px ({given.interpolation})",
            "crop": f"the centre, {size}x{size} px",
        },
        "output": {"name": "logits", "shape": [batch, *graph.shape(graph.output)]},
        "card": card,
    }
    return json.dumps(contract)


def seal(data: bytes) -> bytes:
    """Return a file with the digest written into its contract."""
    start = data.index(_START) + len(_START)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + len(_ZEROS) :]


def read_contract(data: bytes) -> dict:
    """Return the contract in the bytes of a file; raise ValueError if there is none."""
    contract, _ = json.JSONDecoder().raw_decode(data[data.index(_START) :].decode("latin-1"))
    return contract


def is_exported(path: str | os.PathLike) -> bool:
    """Return true if the path has the suffix of a file that carries a contract."""
    return os.fspath(path).endswith(SUFFIXES)


def read_exported(path: str | os.PathLike) -> Exported:
    """Read a file that `export_weights` wrote; raise WeightsError for any other, and for one that was changed."""
    path = as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().length > _LARGEST:
        raise WeightsError(f"{path} has {path.stat().length:,} bytes; no MobileNet has more than {_LARGEST:,}")
    data = path.read_bytes()
    found = data.find(_START)
    if found < 0:
        raise WeightsError(f"{path} has no contract; valid: a file that python -m mobilenet_jax.export wrote")
    start = found + len(_START)
    digest = data[start : start + len(_ZEROS)]
    if hashlib.sha256(data[:start] + _ZEROS + data[start + len(_ZEROS) :]).hexdigest().encode() != digest:
        raise WeightsError(f"{path} is damaged, or was changed since it was exported: its SHA-256 is another")
    try:
        contract = read_contract(data)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the contract of {path} is no JSON: {error}") from error
    spec = check_card(contract.get("card"), source=str(path))
    return Exported(data, contract, spec, path.suffix.removeprefix("."))
