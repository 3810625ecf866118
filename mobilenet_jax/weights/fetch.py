"""Published weights by name: downloaded once, continued after an interruption, checked and kept."""

import contextlib
import fcntl
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.folder import CONFIG, PREPROCESSOR, WEIGHTS_FILES, Hints, read_hints

CACHE = Path("~/.cache/mobilenet_jax/weights").expanduser()
_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
# Source: torchvision 0.29.1 models/mobilenetv2.py and mobilenetv3.py. The first file of a model is the default. The
# name of a file ends in the start of its SHA-256.
TORCHVISION_URL = "https://download.pytorch.org/models/"
_TORCHVISION = {
    "mobilenet_v2": {"IMAGENET1K_V2": "mobilenet_v2-7ebf99e0.pth", "IMAGENET1K_V1": "mobilenet_v2-b0353104.pth"},
    "mobilenet_v3_large": {
        "IMAGENET1K_V2": "mobilenet_v3_large-5c1a4163.pth",
        "IMAGENET1K_V1": "mobilenet_v3_large-8738ca79.pth",
    },
    "mobilenet_v3_small": {"IMAGENET1K_V1": "mobilenet_v3_small-047dcff4.pth"},
}
# Source: Keras 3.15.1 applications/mobilenet.py, mobilenet_v2.py, mobilenet_v3.py, for images of 224 px. Keras states
# the MD5 of V3's files and no checksum of the other files.
KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/"
_V1_FILES = {100: "1_0", 75: "7_5", 50: "5_0", 25: "2_5"}
_V2_FILES = {100: "1.0", 75: "0.75", 50: "0.5", 35: "0.35", 130: "1.3", 140: "1.4"}
_V3_FILES = {
    ("MobileNetV3Large", 100): ("large_224_1.0", "59e551e166be033d707958cf9e29a6a7"),
    ("MobileNetV3Large", 75): ("large_224_0.75", "765b44a33ad4005b3ac83185abf1d0eb"),
    ("MobileNetV3Small", 100): ("small_224_1.0", "8768d4c2e7dee89b9d02b2d03d65d862"),
    ("MobileNetV3Small", 75): ("small_224_0.75", "cb65d4e5be93758266aa0a7f2c6708b7"),
}
_NAME = re.compile(r"(torchvision|keras|timm)/(\w+?)(?:_(\d{3}))?(?:\.(\w+))?")


class Published(NamedTuple):
    """A file to download, and the start of its checksum if the publisher states one."""

    url: str
    algorithm: str = "sha256"
    digest: str = ""


def is_remote(text: str | os.PathLike) -> bool:
    """Return True for a name that `fetch` takes, False for a path."""
    return str(text).startswith("hf:") or _NAME.fullmatch(str(text)) is not None


def fetch(name: str, *, offline: bool, check: Callable[[Path, str], None]) -> tuple[Path, Hints]:
    """Return (file, what the publisher says of it); download the file if needed.

    `check` takes a new file without a checksum and its name, and raises WeightsError if it cannot be loaded.

    Raises WeightsError for an unknown name, for a download that fails, and for one that `offline` forbids.
    """
    if name.startswith("hf:"):
        return _fetch_from_hub(name.removeprefix("hf:"), offline=offline)
    published = find_published(name)
    path = CACHE / published.url.rsplit("/", 1)[-1]
    if not path.exists():
        if offline:
            raise WeightsError(f"{name} is not in {CACHE}, and downloads are off")
        download(published, path, check=lambda part: check(part, name))
    _check_pin(path)
    return path, Hints(name)


def find_published(name: str) -> Published:
    """Return the file in which torchvision or Keras publish a model; raise WeightsError if they do not."""
    found = _NAME.fullmatch(name)
    framework, model, percent, tag = found.groups() if found else (None,) * 4
    width = int(percent or 100)
    if framework == "torchvision" and model in _TORCHVISION:
        files = _TORCHVISION[model]
        if tag is None or tag in files:
            file = files[tag or next(iter(files))]
            return Published(TORCHVISION_URL + file, "sha256", file.removesuffix(".pth").rsplit("-", 1)[-1])
        raise WeightsError(f"torchvision has no weights {tag} of {model}; valid: {', '.join(files)}")
    if framework == "keras" and model == "MobileNet" and width in _V1_FILES:
        return Published(f"{KERAS_URL}mobilenet/mobilenet_{_V1_FILES[width]}_224_tf.h5")
    if framework == "keras" and model == "MobileNetV2" and width in _V2_FILES:
        file = f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{_V2_FILES[width]}_224.h5"
        return Published(f"{KERAS_URL}mobilenet_v2/{file}")
    if framework == "keras" and (v3 := _V3_FILES.get((str(model), width))):
        file, digest = v3
        return Published(f"{KERAS_URL}mobilenet_v3/weights_mobilenet_v3_{file}_float.h5", "md5", digest)
    keras = [f"keras/{m}_{w:03d}" for m, ws in (("MobileNet", _V1_FILES), ("MobileNetV2", _V2_FILES)) for w in ws]
    keras += [f"keras/{m}_{w:03d}" for m, w in _V3_FILES]
    known = ", ".join([*(f"torchvision/{m}" for m in _TORCHVISION), *keras])
    raise WeightsError(f"no published weights {name!r} are known; valid: {known}, and hf:timm/MODEL.TAG")


def download(published: Published, path: Path, *, check: Callable[[Path], None]) -> None:
    """Download to `path`, which appears whole or not at all. PATH.part, left by an interrupted download, is continued.

    If several processes download the same file, one does it and the others wait. A file whose publisher states no
    checksum must pass `check`, and its SHA-256 is written beside it.

    Raises WeightsError for a download that is interrupted, which the next call continues, and for wrong content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _lock(part) as file:
        if path.exists():  # another process was faster
            part.unlink()
            return
        try:
            _complete(published.url, file)
        finally:
            if not file.tell():
                part.unlink()
        _check(published, part, check)
        if not published.digest:
            _find_pin(path).write_text(_hash(part, "sha256"))
        part.replace(path)


@contextlib.contextmanager
def _lock(part: Path) -> Iterator[BinaryIO]:
    """Open `part` at its end, for this process alone; wait while another process has it."""
    while True:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this process waited, the other one may have renamed or deleted the file that is open here.
            if part.exists() and os.fstat(file.fileno()).st_ino == part.stat().st_ino:
                yield file
                return


def _complete(url: str, file: BinaryIO) -> None:
    """Append what is missing of the content of `url` to `file`; start again if that cannot be continued."""
    start = file.tell()
    try:
        total = _append(url, file)
    except urllib.error.HTTPError as error:
        if not (start and error.code == 416):
            raise WeightsError(f"{url} cannot be downloaded: {error}") from error
        # No bytes are left: the part is the whole file, or it is longer and so of something else.
        if error.headers["Content-Range"] == f"bytes */{start}":
            return
        file.truncate(0)
        file.seek(0)
        _complete(url, file)
        return
    except (OSError, HTTPException) as error:
        raise WeightsError(f"{url} cannot be downloaded: {error}") from error
    if file.tell() < total:
        raise WeightsError(f"{url} broke off after {file.tell():,} of {total:,} bytes; the same command continues")


def _append(url: str, file: BinaryIO) -> int:
    """Append the content of `url` from the end of `file` on; return the number of bytes that the whole file has."""
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        size = response.headers["Content-Length"]
        if size is None or not size.isdecimal():
            raise WeightsError(f"{url} cannot be downloaded: the server does not state its size")
        if response.status == 206:
            given = response.headers["Content-Range"] or "no range"
            if not given.startswith(f"bytes {start}-"):
                raise WeightsError(f"{url} cannot be continued: bytes {start}- were asked for, the server sent {given}")
        else:
            file.truncate(0)
        total = file.seek(0, os.SEEK_END) + int(size)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return total


def _check(published: Published, part: Path, check: Callable[[Path], None]) -> None:
    """Raise WeightsError and delete `part` if its checksum is wrong, or, without a checksum, if `check` fails."""
    if published.digest:
        digest = _hash(part, published.algorithm)
        if not digest.startswith(published.digest):
            part.unlink()
            raise WeightsError(
                f"{published.url} has {published.algorithm} {digest}, not {published.digest}...: it was deleted"
            )
        return
    try:
        check(part)
    except WeightsError as error:
        part.unlink()
        raise WeightsError(f"{published.url} cannot be loaded and was deleted: {error}") from error


def _check_pin(path: Path) -> None:
    """Raise WeightsError if a file whose publisher states no checksum has changed since it was downloaded."""
    pin = _find_pin(path)
    if pin.exists() and _hash(path, "sha256") != pin.read_text().strip():
        raise WeightsError(f"{path} has changed since it was downloaded; delete it and {pin.name} to download it again")


def _find_pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _hash(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _fetch_from_hub(repository: str, *, offline: bool) -> tuple[Path, Hints]:
    """Do the work of `fetch` for timm and transformers on the Hugging Face hub, whose library keeps its own cache."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError
    except ImportError as error:
        raise WeightsError("names with hf: need huggingface_hub: pip install 'mobilenet_jax[hub]'") from error

    def get(file: str) -> Path:
        return Path(hf_hub_download(repository, file, local_files_only=offline))

    label = f"hf:{repository}"
    try:
        try:
            path = get(WEIGHTS_FILES[0])
        except EntryNotFoundError:  # older repositories have PyTorch's format alone
            path = get(WEIGHTS_FILES[1])
        get(CONFIG)
        with contextlib.suppress(EntryNotFoundError):  # of transformers alone
            get(PREPROCESSOR)
    except (OSError, ValueError) as error:  # the library raises no other kinds
        raise WeightsError(f"{label} cannot be downloaded: {str(error).splitlines()[0]}") from error
    return path, read_hints(path.parent, label=label)
