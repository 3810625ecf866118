"""Files that are never seen half written, on a disk or in a bucket."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator

import fsspec
from etils import epath

from mobilenet_jax.paths import as_path, is_bucket


class DiskFullError(OSError):
    """A file or folder that could not be written, because the disk is full; the message is one sentence."""

    def __init__(self, path: epath.Path, reason: str = "the disk is full or over quota"):
        free = "" if is_bucket(path) else f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free; "
        super().__init__(
            f"{path} could not be written: {reason}; {free}free some space and run the same command, which continues "
            "from the newest checkpoint"
        )


@contextlib.contextmanager
def naming_a_full_disk(path: str | os.PathLike) -> Iterator[None]:
    """Turn an error of the system, of Orbax or of TensorStore that means a full disk into a DiskFullError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _says_disk_is_full(error):
            raise
        raise DiskFullError(as_path(path)) from error


def _says_disk_is_full(error: BaseException) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    said = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", *map(os.strerror, numbers)))
    cause = error.__cause__ or error.__context__
    return said or getattr(error, "errno", None) in numbers or (cause is not None and _says_disk_is_full(cause))


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
        with naming_a_full_disk(path), temporary.open("wb") as file:
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
        (system, old), (_, new) = (fsspec.core.url_to_fs(str(path)) for path in (source, destination))
        files = system.find(old)
        for file in files:
            system.cp_file(file, new + file.removeprefix(old))
        system.rm(files)
    else:
        destination.parent.mkdir(exist_ok=True)
        source.rename(destination)
