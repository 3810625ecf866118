"""Reading one checkpoint: the retries, the checksums, and the difference between damage and a read that failed."""

import json
import re
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from mobilenet_jax.workdir.s3 import is_s3, list_finished, on_disk

# Seconds to wait before a read that failed is repeated.
PAUSES = (0.5, 2.0, 8.0)
# TensorStore raises ValueError for most failures. These words of its messages say that the store failed, not the data.
_STORE_FAILED = re.compile(
    r"OS error|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|CANCELLED|ABORTED"
)
_MISSING = re.compile(r"\[OS error 2: ")  # No such file or directory
_Read = TypeVar("_Read")


class DamagedError(ValueError):
    """A checkpoint with a checksum or a structure that is wrong."""

    def __init__(self, where: epath.Path, reason: str):
        super().__init__(f"{where} is damaged: {reason}")
        self.reason = reason


class CheckpointReadError(OSError):
    """A checkpoint that could not be read, although nothing shows that it is damaged."""


def _attempt(read: Callable[[], _Read], where: epath.Path) -> _Read:
    """Return `read()`; repeat it after an error that is not damage. Raises DamagedError or CheckpointReadError."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except Exception as error:  # Orbax, TensorStore and JSON raise many kinds for a damaged file
            if is_damage(error):
                raise DamagedError(where, first_line(error)) from error
            if pause is None:
                raise CheckpointReadError(
                    f"{where} could not be read in {len(PAUSES) + 1} attempts: {first_line(error)}; nothing was "
                    "changed, run the same command again when the storage answers"
                ) from error
            logging.warning("%s could not be read (%s); the next attempt is in %g s", where, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def is_damage(error: Exception) -> bool:
    """Return whether an error of a read means that files are missing or hold something else than was written."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if isinstance(error, ValueError | KeyError | TypeError | EOFError | AttributeError):
        said = str(error)
        return _STORE_FAILED.search(said) is None or _MISSING.search(said) is not None
    return False


def list_steps(directory: epath.Path) -> list[int]:
    """List the steps of the finished checkpoints in a folder, in ascending order."""
    return list_finished(directory) if is_s3(directory) else sorted(ocp.utils.checkpoint_steps(directory))


def read_meta(where: epath.Path) -> dict:
    """Return the JSON of a checkpoint. Raises DamagedError or CheckpointReadError."""

    def read() -> dict:
        saved = ocp.JsonCheckpointHandler().restore(where / "meta", args=ocp.args.JsonRestore())
        if checksum_meta(saved["content"]) != saved["checksum"]:
            raise ValueError("the checksum of its meta differs")
        return saved["content"]

    return _attempt(read, where)


def read_leaves(where: epath.Path, meta: dict) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint with this `meta`. Raises DamagedError or CheckpointReadError."""

    def read() -> dict[str, np.ndarray]:
        template = {name: np.empty(shape, dtype) for name, (dtype, shape) in meta["shapes"].items()}
        with on_disk(where / "state") as folder:
            leaves = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(template))
        if checksum_leaves(leaves) != meta["checksum"]:
            raise ValueError("the checksum of its state differs")
        return leaves

    return _attempt(read, where)


def checksum_leaves(leaves: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of all leaves, because Orbax does not notice a flipped bit inside a chunk."""
    value = 0
    for name in sorted(leaves):
        value = zlib.crc32(np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8).data, value)
    return value


def checksum_meta(meta: Any) -> int:
    """Return the CRC-32 of the JSON: a flipped bit could move the iterator or change the config."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
