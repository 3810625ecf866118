import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from mobilenet_jax.workdir import environment as environment_module
from mobilenet_jax.workdir.environment import environment


def test_environment_names_versions_devices_and_commit():
    found = environment(["TFRT_CPU_0"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["numpy"] == np.__version__
    assert found["devices"] == ["TFRT_CPU_0"]
    assert found["cpu"]
    json.dumps(found, allow_nan=False)


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_or_none(tmp_path, monkeypatch):
    module = tmp_path / "metrics.py"
    module.write_text("# the module\n")
    monkeypatch.setattr(environment_module, "__file__", str(module))
    _git(tmp_path, "init")
    assert environment([])["commit"] is None  # a repository it does not belong to
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert environment([])["commit"] == commit
    module.write_text("# changed\n")
    assert environment([])["commit"] == commit + "+changes"
