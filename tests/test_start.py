"""Commands answer quickly because they import little before they need it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mobilenet_jax.__main__ import COMMANDS as CONSOLE

ROOT = Path(__file__).resolve().parents[1]
STUDY = f"--config={ROOT}/configs/ablations/shortcut.py:digits"
# Each of these takes a noticeable part of a second, or several.
SLOW = {"jax", "jaxlib", "flax", "optax", "grain", "orbax", "tensorflow", "tensorflow_datasets"}
COMMANDS = [
    ("mobilenet_jax.main", "--config.KEY=VALUE", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.ablate", "--dry_run", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.convert", "--format {safetensors,torchvision,timm}", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.diagnose", "--weights", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.export", "--float_ends", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.predict", "--batch_size", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax.summary", "--diff A B", {"numpy", "PIL", "matplotlib"}),
    ("mobilenet_jax", "--version", {"numpy", "PIL", "matplotlib"}),
    ("benchmarks.speed", "--python_torch", {"numpy", "PIL", "matplotlib"}),
    ("benchmarks.manifold", "--seeds", {"numpy", "PIL", "matplotlib"}),
]


class Answer(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str  # without the lines of -X importtime
    imported: set[str]


def start(*argv: str) -> Answer:
    """Run `python -m argv` and record what it imports."""
    command = [sys.executable, "-X", "importtime", "-m", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    err = [line for line in lines if not line.startswith("import time:")]
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    return Answer(done.returncode, done.stdout, "\n".join(err), imported)


@pytest.mark.parametrize(("module", "said", "unneeded"), COMMANDS)
def test_trap_35_help_imports_nothing_slow(module, said, unneeded):
    answer = start(module, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert said in answer.out
    assert "argparse" in answer.imported
    assert not answer.imported & (SLOW | unneeded)


def test_every_command_of_the_package_is_tested():
    stems = {path.stem for path in (ROOT / "mobilenet_jax").glob("*.py")} - {"__init__", "__main__", "paths", "plots"}
    assert stems == {module.removeprefix("mobilenet_jax.") for module, *_ in COMMANDS if "mobilenet_jax." in module}
    assert stems == {module for module, *_ in CONSOLE.values()}


@pytest.mark.parametrize(("command", "said"), [("train", "--workdir"), ("summary", "--diff A B")])
def test_the_console_script_passes_the_arguments_on(command, said):
    answer = start("mobilenet_jax", command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert said in answer.out
    assert not answer.imported & (SLOW | {"numpy", "PIL", "matplotlib"})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([STUDY, "--config.model.widht=1"], "--config.model has no key 'widht', did you mean width?"),
        ([STUDY, "--only=some"], "--only is 'some'; valid: bottleneck, expansion, none"),
    ],
)
def test_a_mistake_in_a_study_is_refused_before_anything_slow_is_imported(argv, said):
    answer = start("mobilenet_jax.ablate", *argv)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "\n" not in answer.err
    assert not answer.imported & (SLOW | {"matplotlib"})


def test_the_costs_of_a_network_are_printed_without_slow_imports():
    answer = start("mobilenet_jax.summary", "mobilenet_v2", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out)["madds"] == 300_774_272
    assert not answer.imported & (SLOW | {"numpy", "PIL", "matplotlib"})
