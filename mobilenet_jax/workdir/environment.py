"""What a result depends on beside the config: versions, machine, commit."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "mobilenet_jax",
)


def environment(devices: Sequence[str]) -> dict:
    """What a result depends on beside the config: versions, machine, devices, commit of the checkout.

    Args:
      devices: descriptions of the devices in use, as the caller has them.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _find_cpu(),
        "cpu_count": os.cpu_count(),
        "devices": list(devices),
        "packages": {name: _find_version(name) for name in _PACKAGES},
        "commit": _find_commit(),
    }


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _find_cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():  # Linux, where platform.processor() is empty or the bare architecture
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _find_commit() -> str | None:
    """The commit of the checkout this file is in, "+changes" where files differ; None outside a checkout."""
    git = shutil.which("git")
    here = Path(__file__).resolve()
    if git is None:
        return None

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)

    # An installed copy can lie in a repository that is not this project's: there the file is not tracked.
    if run("ls-files", "--error-unmatch", here.name).returncode:
        return None
    commit = run("rev-parse", "HEAD").stdout.strip()
    return commit + ("+changes" if run("status", "--porcelain", "--untracked-files=no").stdout else "")
