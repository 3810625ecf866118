"""The environment that a result depends on besides the config: versions, machine, commit."""

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
    """Return versions, machine, devices and the commit of the checkout, as JSON.

    `devices` describes the devices in use.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _find_cpu(),
        "cpu_count": os.cpu_count(),
        "devices": list(devices),
        "packages": find_versions(_PACKAGES),
        "commit": _find_commit(),
    }


def find_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return {package: its installed version, or None if it is not installed}."""
    return {name: _find_version(name) for name in packages}


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # the code runs from a checkout that is not installed
        return None


def _find_cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():  # on Linux, platform.processor() is empty or the architecture alone
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _find_commit() -> str | None:
    """Return the commit of this file's checkout, with "+changes" if files differ; None outside a checkout."""
    git = shutil.which("git")
    here = Path(__file__).resolve()
    if git is None:
        return None

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([git, *arguments], cwd=here.parent, capture_output=True, text=True, check=False)

    # An installed copy can lie in another project's repository, which does not track this file.
    if run("ls-files", "--error-unmatch", here.name).returncode:
        return None
    commit = run("rev-parse", "HEAD").stdout.strip()
    return commit + ("+changes" if run("status", "--porcelain", "--untracked-files=no").stdout else "")
