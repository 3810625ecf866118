"""Whole runs on several processes of 2 CPU devices each: the command line, with a tiny network."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilenet_jax.models.spec import Conv, InvertedResidual, Spec

SPEC = Spec(
    name="tiny",
    stem=Conv(filters=8, stride=2),
    blocks=(InvertedResidual(expanded=16, filters=8),),
    head=None,
    num_classes=5,
    padding="same",
    bn_epsilon=1e-3,
    bn_decay=0.8,
    dropout=0.0,
)
ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = {
    "model.name": "tiny",
    "data.image_size": 16,
    "data.batch_size": 32,
    "train.log_every_steps": 1,
    "train.eval_every_epochs": 0.0,
    "train.save_every_epochs": 0.0,
    # Nothing that depends on the length of the run.
    "optim.schedule": "constant",
    "optim.warmup_epochs": 0.0,
    "optim.lr_per_256": 1.0,
}
MAIN = """
import sys
from processes import make_tiny_spec
from mobilenet_jax.main import main
from jax.experimental import multihost_utils
from mobilenet_jax.models import zoo
compare = multihost_utils.assert_equal
def compare_names(values, message=""):
    # `jax.device_put` would compare every leaf of the state with the other processes.
    assert message.startswith("sync_global_devices"), message
    compare(values, message)
multihost_utils.assert_equal = compare_names
zoo.MODELS["tiny"] = make_tiny_spec
sys.exit(main())
"""


def make_tiny_spec(*, width: float, convention: str) -> Spec:
    del width, convention
    return SPEC


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(
    workdir: Path, *, steps: int, processes: int, own: Sequence[dict] = (), mode: str = "train"
) -> list[subprocess.Popen]:
    """Start the command line on `processes` processes of 2 CPU devices each; `own` are overrides of each process."""
    command = [sys.executable, "-c", MAIN, "--config", str(ROOT / "configs" / "v2.py"), "--mode", mode]
    command += ["--workdir", str(workdir), "--compilation_cache", str(workdir.parent / "cache")]
    if processes > 1:
        command += ["--coordinator_address", f"127.0.0.1:{free_port()}", "--num_processes", str(processes)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "training")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = []
    for process in range(processes):
        values = {**OVERRIDES, "train.steps": steps, **(own[process] if own else {})}
        arguments = [f"--config.{key}={value}" for key, value in values.items()]
        arguments += ["--process_id", str(process)] if processes > 1 else []
        running.append(subprocess.Popen(command + arguments, **pipes))
    return running


def finish(running: list[subprocess.Popen], *, code: int = 0) -> list[str]:
    """What each process said on stderr; all end with the exit code."""
    try:
        said = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [code] * len(running), "\n".join(said)
    return said
