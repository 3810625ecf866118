"""The time of a whole command that names what is on a folder of photographs, from its start to the last line of CSV."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.speed.turns import WorkerError, compare, read_last_line

_ROOT = Path(__file__).resolve().parents[2]
_WORKERS = Path(__file__).resolve().parent / "workers"
OWN_SIDES = ("ours", "ours_tflite", "ours_onnx")
PEERS = ("torch", "onnx")


def write_weights(name: str, folder: Path) -> dict[str, Path]:
    """Write random weights of a model and their exports; return {suffix: file}.

    Without the extra `export`, only the weights are written.
    """
    from mobilenet_jax import create_model, export_weights, save_weights
    from mobilenet_jax.exporting.runtime import MissingPackageError
    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.weights.card import HALF, make_card

    model = create_model(name)
    card = make_card(
        name=name,
        model=name,
        width=1.0,
        convention="keras",
        spec=model.spec,
        preprocessing=replace(HALF, image_size=224, crop_share=0.875),
        class_names=None,
        source={"file": "random", "sha256": "none"},
    )
    variables = init_variables(model, seed=0)
    files = {"safetensors": folder / f"{name}.safetensors"}
    save_weights(files["safetensors"], model, variables, card)
    for kind in ("tflite", "onnx"):
        try:
            export_weights((model, variables, card), format=kind, out=folder / kind, batch="dynamic")
        except MissingPackageError:
            continue
        files[kind] = folder / kind / f"{name}.{kind}"
    return files


def make_commands(
    name: str, files: Mapping[str, Path], photographs: Path, cache: Path, *, pythons: Mapping[str, str], threads: int
) -> dict[str, list[str]]:
    """Return the command of each side; sides whose file or interpreter is not given are left out."""
    own = [sys.executable, "-m", "mobilenet_jax.predict", "--csv", f"--compilation_cache={cache}"]
    kinds = dict(zip(OWN_SIDES, ("safetensors", "tflite", "onnx"), strict=True))
    commands = {
        side: [*own, f"--weights={files[kind]}", str(photographs)] for side, kind in kinds.items() if kind in files
    }
    if "torch" in pythons:
        commands["torch"] = [pythons["torch"], str(_WORKERS / "torch_predict.py"), name, str(photographs), str(threads)]
    if "onnx" in pythons and "onnx" in files:
        worker = str(_WORKERS / "onnx_predict.py")
        commands["onnx"] = [pythons["onnx"], worker, str(files["onnx"]), str(photographs), str(threads)]
    return commands


def measure_predictions(
    name: str, photographs: Path, *, against: Sequence[str], pythons: Mapping[str, str], rounds: int, threads: int
) -> dict:
    """Run the command of every side in turns, after one that compiles.

    Args:
      name: the model.
      photographs: a folder of JPEGs.
      against: peers of PEERS; our command runs with weights and with exported files.
      pythons: the interpreters of the peers that do not run in this one.
      rounds: timed runs of each side.
      threads: processor cores.

    Returns:
      {"count": images, "sides": {side: {"about": {"first_seconds": of the run that was not timed}, "seconds":
      [of each run], "images_per_second"}}, "ratios", "absent", "failed"} as `turns.measure` returns them.
    """
    count = sum(file.is_file() for file in photographs.rglob("*"))
    result: dict = {"count": count, "sides": {}, "ratios": {}, "absent": {}, "failed": {}}
    pythons = {peer: pythons.get(peer, sys.executable) for peer in against if peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        files = write_weights(name, Path(folder))
        cache = Path(folder) / "cache"
        commands = make_commands(name, files, photographs, cache, pythons=pythons, threads=threads)
        for side, command in list(commands.items()):
            try:
                first = time_command(side, command, count)
                result["sides"][side] = {"about": {"first_seconds": first}, "seconds": []}
            except WorkerError as error:
                result["absent" if "No module named" in str(error) else "failed"][side] = str(error)
                del commands[side]
        for number in range(rounds):
            for side in list(commands)[:: -1 if number % 2 else 1]:
                result["sides"][side]["seconds"].append(time_command(side, commands[side], count))
    for values in result["sides"].values():
        values["images_per_second"] = count / statistics.median(values["seconds"])
    return {**result, "ratios": compare(result["sides"], "ours")}


def time_command(side: str, command: list[str], count: int) -> float:
    """Run a command that prints CSV; return its seconds.

    Raises:
      WorkerError: it failed, or it did not print five answers for each of `count` images.
    """
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise WorkerError(f"{side} ended with exit code {done.returncode}: {read_last_line(errors)}")
    lines = len(done.stdout.splitlines())
    if lines != 1 + 5 * count:
        raise WorkerError(f"{side} printed {lines} lines, where {1 + 5 * count} were expected")
    return seconds
