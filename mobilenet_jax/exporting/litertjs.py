"""LiteRT.js, the runtime of the page: found, or installed by npm, and checked file by file."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mobilenet_jax.workdir.files import write_atomic

VERSION = "2.5.3"
CACHE = Path(f"~/.cache/mobilenet_jax/litertjs/{VERSION}").expanduser()
_TIMEOUT = 600  # seconds; npm fetches 13 MB
# {path in node_modules: (path in the exported folder, SHA-256)}, of the releases of 2026 on registry.npmjs.org.
# Browsers without relaxed SIMD take the wasm that is called compat. package.json names the licence and the source.
_FILES = {
    "@litertjs/core/dist/index.js": (
        "core/index.js",
        "e7daccc3a31eef890848a737ccb863ded5f046a6b40c3fdc0556495adeb5d9b3",
    ),
    "@litertjs/core/package.json": (
        "core/package.json",
        "1ba6b1c4b25c061cf97876e4846be92f8dfe312d2f78d82ee3ee92ab45c80987",
    ),
    "@litertjs/core/wasm/litert_wasm_internal.js": (
        "wasm/litert_wasm_internal.js",
        "68efb69f770e3f76aff36a377de629ca496c131b86ac0f0f4b592a1543a898eb",
    ),
    "@litertjs/core/wasm/litert_wasm_internal.wasm": (
        "wasm/litert_wasm_internal.wasm",
        "7280cf4471774867e385e6c3cd53e2b45e2975b80fea338fff4ef359b0865614",
    ),
    "@litertjs/core/wasm/litert_wasm_compat_internal.js": (
        "wasm/litert_wasm_compat_internal.js",
        "4d8f894b7883654fd6e8439730aa41e79ceaab7d19184fc4f1f0b0f1a2a2c8a5",
    ),
    "@litertjs/core/wasm/litert_wasm_compat_internal.wasm": (
        "wasm/litert_wasm_compat_internal.wasm",
        "5255c8ad06eabdbd2522cdebf6b22fc10faf74625c23a49b9e072570cd1fa41c",
    ),
    "@litertjs/wasm-utils/dist/index.js": (
        "wasm-utils/index.js",
        "e0e20bc28ab001ac732cf40d15b6eebd24fb0deaeb95eeba5100f51eebf015f2",
    ),
    "@litertjs/wasm-utils/package.json": (
        "wasm-utils/package.json",
        "ae611a4748709d61321ab658619617ba5a82212463b2f07a9aea2ad179e34ded",
    ),
}
_INSTALL = f"npm install @litertjs/core@{VERSION} @litertjs/wasm-utils@{VERSION}"


class LiteRTJSError(ValueError):
    """LiteRT.js is not there, or is not the release that the page was written for; the message is one sentence."""


def read_litertjs(*, offline: bool = False) -> dict[str, bytes]:
    """Return the files of LiteRT.js by their paths in the exported folder, which are relative to litertjs/.

    They come from the cache. If that lacks one, or one is damaged, npm fetches them.

    Args:
      offline: do not call npm.

    Raises:
      LiteRTJSError: npm is missing or fails, or a file differs from the release.
    """
    found = _read(CACHE)
    if _find_fault(found):
        if offline:
            raise LiteRTJSError(f"LiteRT.js is not in {CACHE}, and downloads are off")
        found = _fetch()
        _keep(found)
    return {place: found[name] for name, (place, _) in _FILES.items()}


def install_litertjs(folder: str | os.PathLike) -> None:
    """Copy LiteRT.js into the cache, for a machine without npm.

    Args:
      folder: where npm has installed both packages: the folder that holds node_modules, or node_modules itself.

    Raises:
      LiteRTJSError: a file is missing or differs from the release.
    """
    given = Path(folder).expanduser()
    inner = given / "node_modules"
    found = _read(inner if inner.is_dir() else given)
    if fault := _find_fault(found):
        raise LiteRTJSError(f"{given} {fault}; valid: the folder in which this was run: {_INSTALL}")
    _keep(found)


def _read(modules: Path) -> dict[str, bytes]:
    """Return those of the files that are there."""
    return {name: (modules / name).read_bytes() for name in _FILES if (modules / name).is_file()}


def _find_fault(found: Mapping[str, bytes]) -> str:
    """Return what is wrong with the files, as the end of a sentence; "" if all are those of the release."""
    for name, (_, digest) in _FILES.items():
        if name not in found:
            return f"has no {name}"
        if hashlib.sha256(found[name]).hexdigest() != digest:
            return f"has another {name} than release {VERSION}"
    return ""


def _fetch() -> dict[str, bytes]:
    """Let npm install the packages in a temporary folder; return their files."""
    npm = shutil.which("npm")
    if npm is None:
        raise LiteRTJSError(
            f"format web needs LiteRT.js, and npm, which fetches it, is not installed; install npm, or run "
            f"`{_INSTALL}` on another machine and pass its folder as --litertjs=DIR"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, *_INSTALL.split()[1:], "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT, cwd=folder)
        except subprocess.TimeoutExpired as error:
            raise LiteRTJSError(f"npm did not fetch LiteRT.js in {_TIMEOUT} seconds") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise LiteRTJSError(f"npm could not fetch LiteRT.js: {lines[0]}")
        found = _read(Path(folder) / "node_modules")
    if fault := _find_fault(found):
        raise LiteRTJSError(f"what npm fetched {fault}, so it is not used")
    return found


def _keep(files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = CACHE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
