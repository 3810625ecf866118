"""Files that are never seen half written."""

import json
import os
from pathlib import Path


def write_json_atomic(path: str | os.PathLike, obj) -> None:
    """Writes indented JSON such that at any moment the file is the old one or the new one, on disk.

    Raises:
      ValueError, TypeError: the object has no JSON form; numbers that are not finite have none.
    """
    write_text_atomic(Path(path), json.dumps(obj, indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 such that at any moment the file is the old one or the new one, on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)
