"""Paths of local files and of objects in buckets."""

import importlib.util
import os
import re

from etils import epath

# {scheme of a URL: the package that fsspec needs for it}
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def as_path(path: str | os.PathLike) -> epath.Path:
    """Return a local path, or a path in a bucket for gs://BUCKET/... and s3://BUCKET/....

    Raises ValueError, in one sentence, for another kind of URL, and if the package for the bucket is not installed.
    """
    text = os.fspath(path)
    scheme, slashes = re.match(r"(?:([a-z][a-z0-9+.-]+):(/+))?", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    if scheme is None:
        return epath.Path(text)
    if scheme not in _PACKAGES or slashes != "//":
        raise ValueError(f"{text} is not a path; valid: a local path, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    package = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f'{text} needs the package {package}; install it with pip install -e ".[cloud]"')
    return epath.Path(text)


def is_bucket(path: epath.Path) -> bool:
    """Return whether a path lies in a bucket."""
    return "://" in str(path)


def check_reachable(path: epath.Path) -> None:
    """Raise OSError, in one sentence, if the bucket of a path does not answer. A local path is not checked."""
    if not is_bucket(path):
        return
    try:
        path.exists()
    except Exception as error:  # each client raises its own kinds for credentials, rights and connections
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise OSError(f"{path} cannot be reached: {said}") from error
