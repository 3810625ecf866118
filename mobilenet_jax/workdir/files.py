"""Files that are never seen half written."""

import json
import os
from pathlib import Path


def write_json_atomic(path: str | os.PathLike, value) -> None:
    """Write indented JSON as `write_atomic` does.

    Raises ValueError or TypeError for a value that has no JSON form; numbers that are not finite have none.
    """
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8. At any moment the file on disk is the old one or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
