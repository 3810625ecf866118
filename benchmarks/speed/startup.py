"""The time from a command to its first training step, with and without compiled programs on disk."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.speed.turns import WorkerError, read_last_line

_ROOT = Path(__file__).resolve().parents[2]


def measure_startup(overrides: Mapping[str, object], *, rounds: int) -> dict[str, dict]:
    """Start `main` with configs/v2.py and `overrides`, each time until its first step is compiled.

    Each round is a start with an empty cache of compiled programs, then a start with the cache that the first one left.

    Returns:
      {"cold" | "warm": {"seconds": [of each round, from the command on], "split": [{"import": ..., ...}]}}.

    Raises:
      FileNotFoundError: there is no configs folder: the package was installed without its checkout.
      WorkerError: main ended before its first step; the message has its last line.
    """
    config = _ROOT / "configs" / "v2.py"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is not there: start-up is measured in a checkout of the project")
    results = {kind: {"seconds": [], "split": []} for kind in ("cold", "warm")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, result in results.items():
                workdir = Path(folder) / kind
                command = [sys.executable, "-m", "mobilenet_jax.main", f"--config={config}"]
                command += [f"--workdir={workdir}", f"--compilation_cache={folder}/cache"]
                command += [f"--config.{key}={value}" for key, value in overrides.items()]
                seconds, split = time_first_step(command, workdir)
                result["seconds"].append(seconds)
                result["split"].append(split)
    return results


def time_first_step(command: list[str], workdir: Path) -> tuple[float, dict[str, float]]:
    """Run a command of `main` until it writes WORKDIR/startup.json, then end its process.

    Returns:
      (seconds until the file was there, the seconds of each part of the start from the file).

    Raises:
      WorkerError: the process ended without the file.
    """
    start, file = time.perf_counter(), workdir / "startup.json"
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        try:
            while not file.exists():
                if process.poll() is not None and not file.exists():
                    last = read_last_line(errors)
                    raise WorkerError(f"main ended with exit code {process.returncode} before its first step: {last}")
                time.sleep(0.01)
            return time.perf_counter() - start, json.loads(file.read_text())
        finally:
            process.kill()
