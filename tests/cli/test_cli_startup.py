"""The setup of a process, in a process of its own: XLA reads its flags once."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from mobilenet_jax.cli.startup import configure_jax
from mobilenet_jax.main import parse
flags, _ = parse(["--config=x", "--compilation_cache=off", *sys.argv[1:]])
configure_jax(flags)
print(os.environ.get("XLA_FLAGS"))
"""
OWN = "--xla_cpu_enable_fast_math=false"


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [([], OWN), (["--deterministic"], f"{OWN} --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0")],
)
def test_deterministic_sets_flags_that_xla_knows_and_keeps_those_of_the_user(arguments, flags):
    # XLA ends a process whose XLA_FLAGS have a flag that it does not know.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": OWN}
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, f"{flags}\n"), done.stderr
