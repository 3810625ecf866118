"""Checkpoints in S3. Orbax writes none there, so they are written on the local disk and copied."""

import contextlib
import re
import tempfile
from collections.abc import Iterator

import fsspec
from etils import epath

# Written after all other files of a checkpoint: without it, the copy was interrupted.
COMMIT_FILE = "commit_success.txt"


def is_s3(path: epath.Path) -> bool:
    """Return whether a path lies in S3."""
    return str(path).startswith("s3://")


def list_finished(directory: epath.Path) -> list[int]:
    """List the steps of the checkpoints that were copied to the end, in ascending order."""
    system, root = _open(directory)
    names = (re.fullmatch(rf"(\d+)/{COMMIT_FILE}", file.removeprefix(f"{root}/")) for file in system.find(root))
    return sorted(int(name[1]) for name in names if name)


def upload(local: epath.Path, remote: epath.Path, *, keep: int) -> None:
    """Copy a checkpoint, then delete all but the newest `keep` checkpoints in its folder."""
    system, root = _open(remote)
    disk, path = fsspec.core.url_to_fs(str(local))
    for file in disk.find(path):
        system.put_file(file, root + file.removeprefix(path))
    system.pipe_file(f"{root}/{COMMIT_FILE}", b"done")
    for step in list_finished(remote.parent)[:-keep]:
        old = _open(remote.parent / str(step))[1]
        system.rm_file(f"{old}/{COMMIT_FILE}")  # first: what is left, if this is interrupted, is no checkpoint
        system.rm(old, recursive=True)


@contextlib.contextmanager
def on_disk(folder: epath.Path) -> Iterator[epath.Path]:
    """Give a folder that Orbax can read: for one in S3, a copy that exists inside the context."""
    if not is_s3(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        system, root = _open(folder)
        for file in system.find(root):
            target = epath.Path(name + file.removeprefix(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(file, str(target))
        yield epath.Path(name)


def _open(path: epath.Path) -> tuple[fsspec.AbstractFileSystem, str]:
    return fsspec.core.url_to_fs(str(path), use_listings_cache=False)
