"""A static folder for a browser: a page, LiteRT.js, the network, and a second one to compare it with."""

import json
import os
import tempfile
from importlib import resources
from pathlib import Path

from mobilenet_jax.exporting import litertjs
from mobilenet_jax.exporting.export import export_weights
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.paths import as_path
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.files import write_atomic

_LABELS = {"none": "float32", "float16": "float16 kernels", "int8": "int8"}


def export_page(
    weights: str | os.PathLike | tuple[MobileNet, dict, dict],
    *,
    out: str | os.PathLike | None = None,
    resolution: int | None = None,
    quantize: str = "none",
    calibration: str | None = None,
    per_tensor: bool = False,
    name: str | None = None,
    select: str | None = None,
    offline: bool = False,
) -> dict:
    """Write the folder of a page that runs weights in a browser; return its report.

    The folder holds the page, LiteRT.js under litertjs/, and under models/ the float network and, if `quantize` is not
    "none", the quantized one, each with its contract. models.json lists them for the page; report.json has the report
    of each under "models", and the size of all. A folder on any web server is enough. Nothing is written if a network
    cannot be exported.

    Args:
      weights: a file, a workdir or a name, or (model, variables, card) of `load_weights`.
      out: a folder; default: exports/NAME_web.
      resolution, quantize, calibration, per_tensor, name, select, offline: see `export_weights`.

    Raises:
      ParityError, ValueError, OSError: see `export_weights` and `litertjs.read_litertjs`.
    """
    runtime = litertjs.read_litertjs(offline=offline)
    kinds = ["none"] if quantize == "none" else ["none", quantize]
    # A run that trained in int8 has its ranges in its workdir, so the quantized export reads the workdir itself.
    loaded = weights if isinstance(weights, tuple) else load_weights(weights, name, select=select, offline=offline)
    if not loaded[0].spec.num_classes:
        raise ValueError(f"the weights {loaded[2]['name']} have no classifier, and the page shows classes")
    files = {f"litertjs/{place}": data for place, data in runtime.items()} | _read_page()
    entries, reports = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            report = export_weights(
                loaded if kind == "none" else weights,
                format="tflite",
                out=Path(folder) / kind,
                batch=1,
                resolution=resolution,
                quantize=kind,
                calibration=calibration,
                per_tensor=per_tensor and kind == "int8",
                float_ends=kind == "int8",  # LiteRT.js takes and returns no int8
                name=name,
                select=select,
                offline=offline,
            )
            written = Path(report["file"])
            file, contract = f"models/{written.name}", f"models/{written.stem}.json"
            files |= {file: written.read_bytes(), contract: written.with_suffix(".json").read_bytes()}
            entries.append({"label": _LABELS[kind], "file": file, "contract": contract, "bytes": report["bytes"]})
            reports[kind] = {**report, "file": file}
    target = as_path(out or f"exports/{Path(entries[0]['file']).stem}_web")
    found = {
        "file": str(target / "index.html"),
        "format": "web",
        "quantize": quantize,
        "bytes": sum(map(len, files.values())),
        "litertjs": litertjs.VERSION,
        "models": reports,
    }
    files |= {"models.json": _to_json({"models": entries}), "report.json": _to_json(found)}
    for place, data in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target / place, data)
    return found


def _read_page() -> dict[str, bytes]:
    """Return the files of the page by their names."""
    folder = resources.files("mobilenet_jax.exporting") / "web"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def _to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
