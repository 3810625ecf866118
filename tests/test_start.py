"""What needs no JAX answers without importing it."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDY = f"--config={ROOT}/configs/ablations/shortcut.py:digits"
SLOW = {"jax", "jaxlib", "flax", "grain", "orbax", "tensorflow"}


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str  # without the lines of -X importtime
    imported: set[str]
    seconds: float  # of processor time, which is the wall clock's on a machine with nothing else to do


def start(module: str, *argv: str) -> Answer:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", f"mobilenet_jax.{module}", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stderr.splitlines()
    err = [line for line in lines if not line.startswith("import time:")]
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(done.returncode, done.stdout, "\n".join(err), imported, seconds)


@pytest.mark.parametrize(
    ("module", "said", "unneeded"),
    [
        ("main", "--config.KEY=VALUE", {"matplotlib"}),
        ("ablate", "--dry_run", {"matplotlib"}),
        ("benchmark", "--python_torch", {"numpy", "matplotlib", "PIL"}),
        ("convert", "--format {safetensors,torchvision,timm}", {"numpy"}),
        ("diagnose", "--weights", {"numpy", "matplotlib", "PIL"}),
        ("manifold", "--seeds", set()),
        ("predict", "--batch_size", {"numpy", "PIL"}),
        ("summary", "--diff A B", {"numpy"}),
    ],
)
def test_trap_35_help_is_soon_and_imports_no_jax(module, said, unneeded):
    answer = start(module, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert said in answer.out
    assert "argparse" in answer.imported
    assert not answer.imported & (SLOW | unneeded)
    assert answer.seconds < 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([STUDY, "--config.model.widht=1"], "--config.model has no key 'widht', did you mean width?"),
        ([STUDY, "--only=some"], "--only is 'some'; valid: bottleneck, expansion, none"),
    ],
)
def test_a_study_is_refused_as_soon(argv, said):
    answer = start("ablate", *argv)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "\n" not in answer.err
    assert not answer.imported & (SLOW | {"matplotlib"})
    assert answer.seconds < 1


def test_a_network_is_counted_as_soon():
    answer = start("summary", "mobilenet_v2", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out)["madds"] == 300_774_272
    assert not answer.imported & (SLOW | {"numpy"})
    assert answer.seconds < 1
