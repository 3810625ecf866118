"""From a command to its first training step, with and without compiled programs on disk."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.turns import WorkerError

_ROOT = Path(__file__).resolve().parents[2]
_LINE = re.compile(r"first step after [\d.]+ s: (.*)")  # as main prints it: "import 2.1, data 0.0, ..."


def measure_startup(overrides: Mapping[str, object], *, rounds: int) -> dict[str, dict]:
    """Start `main` with configs/v2.py and `overrides` until it says that its first step is compiled.

    Each round is a start with an empty cache of compiled programs, then one with what that left.

    Returns:
      {"cold" | "warm": {"seconds": [of each round, from the command on], "split": [{"import": ..., ...}]}}.

    Raises:
      FileNotFoundError: there is no configs folder: the package was installed without its checkout.
      WorkerError: main ended before its first step, with its last line.
    """
    config = _ROOT / "configs" / "v2.py"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is not there: start-up is measured in a checkout of the project")
    results = {kind: {"seconds": [], "split": []} for kind in ("cold", "warm")}
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            for kind, result in results.items():
                command = [sys.executable, "-m", "mobilenet_jax.main", f"--config={config}"]
                command += [f"--workdir={folder}/{kind}", f"--compilation_cache={folder}/cache"]
                command += [f"--config.{key}={value}" for key, value in overrides.items()]
                seconds, split = time_first_step(command)
                result["seconds"].append(seconds)
                result["split"].append(split)
    return results


def time_first_step(command: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds until the line of the first step, and the split it gives; the process is ended there.

    Raises WorkerError if it ends by itself before.
    """
    start, last = time.perf_counter(), "it said nothing"
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := _LINE.search(line):
                    seconds = time.perf_counter() - start
                    parts = (part.split() for part in found[1].split(", "))
                    return seconds, {name: float(value) for name, value in parts}
                last = line.strip() or last
            process.wait()
        finally:
            process.kill()
    raise WorkerError(f"main ended with exit code {process.returncode} before its first step: {last}")
