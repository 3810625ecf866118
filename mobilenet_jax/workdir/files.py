"""Files that are never seen half written, on a disk or in a bucket."""

import json
import os

import fsspec
from etils import epath

from mobilenet_jax.paths import as_path, is_bucket


def write_json_atomic(path: str | os.PathLike, value) -> None:
    """Write indented JSON as `write_atomic` does.

    Raises ValueError or TypeError for a value that has no JSON form; numbers that are not finite have none.
    """
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8. At any moment the file is the old one or the new one, whole."""
    path = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):  # an object appears whole
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # puts the new name on disk
    finally:
        os.close(folder)


def move_folder(source: epath.Path, destination: epath.Path) -> None:
    """Move a folder; in a bucket, its objects are copied and then deleted."""
    if is_bucket(source):
        system, path = fsspec.core.url_to_fs(str(source))
        system.mv(path, fsspec.core.url_to_fs(str(destination))[1], recursive=True)
    else:
        destination.parent.mkdir(exist_ok=True)
        source.rename(destination)
