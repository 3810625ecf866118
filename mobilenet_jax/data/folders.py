"""The image files of a folder that has one folder for each class, on a disk or in a bucket."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from mobilenet_jax.paths import as_path, is_bucket

Folder = Path | epath.Path  # on a disk, or in a bucket

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# The names of the folders of each split, in any case; of several that are there, the first counts.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}


class Listing(NamedTuple):
    """The image files of a split by class, sorted, and the number of other files and folders by the reason."""

    files: dict[str, list[Folder]]
    ignored: Counter[str]


def is_image(file: Folder) -> bool:
    """Return whether a file is an image by its name."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")  # macOS leaves ._NAME.jpg


def list_split(path: str, split: str) -> Listing:
    """List the train or the test images of a folder.

    The folder has train/CLASS and test/CLASS, or CLASS alone, with images at any depth in CLASS. SPLIT_NAMES has the
    other names of train and test. In a folder without splits, each class is split by itself (see `_take_part`).

    Raises:
      ValueError: a folder without classes, a class without images, or splits of different classes.
      FileNotFoundError: `path` is not a folder.
    """
    root: Folder = as_path(path)
    if not is_bucket(root):
        root = Path(root)
    if not path or not root.is_dir():
        raise FileNotFoundError(f"data.path is {path!r}; valid: a folder of train/CLASS/*.jpg or of CLASS/*.jpg")
    folders = _subfolders(root)
    train, test = (_find_part(folders, SPLIT_NAMES[name]) for name in ("train", "test"))
    if train is None:  # one folder, in which a class may be called train
        if test is not None:
            raise ValueError(
                f"data.path is {str(root)!r}, which has {test.name}/ but neither train/ nor training/ with class "
                "folders; valid: both, or class folders alone"
            )
        whole = _list_classes(root, folders)
        files = {name: _take_part(paths, root, split) for name, paths in whole.files.items()}
        return Listing(files, whole.ignored if split == "train" else Counter())
    if test is not None:
        _check_same_classes(root, train, test)
    elif split == "test":
        raise ValueError(
            f"data.path is {str(root)!r}, which has {train.name}/ but neither test/ nor val/; valid: one of them, or "
            "data.holdout above 0"
        )
    part = train if split == "train" or test is None else test
    return _list_classes(part, _subfolders(part))


def _find_part(folders: list[Folder], names: tuple[str, ...]) -> Folder | None:
    """Return the folder of a split: the first of `names` that is there and has class folders."""
    found = {folder.name: folder for folder in folders if folder.name.lower() in names}
    ordered = sorted(found, key=lambda name: (names.index(name.lower()), name != name.lower()))
    return next((found[name] for name in ordered if _subfolders(found[name])), None)


def _check_same_classes(root: Folder, train: Folder, test: Folder) -> None:
    names, test_names = ({folder.name for folder in _subfolders(part)} for part in (train, test))
    if odd := sorted(names ^ test_names):
        raise ValueError(
            f"data.path is {str(root)!r}, where only one of {train.name}/ and {test.name}/ has {', '.join(odd)}; "
            "valid: the same class folders in both"
        )


def _list_classes(root: Folder, folders: list[Folder]) -> Listing:
    """List the image files of each class folder of `root`; classes and files are sorted by name."""
    if not folders:
        raise ValueError(f"data.path: {root} has no class folders; valid: CLASS/*.jpg, one folder per class")
    names = {folder.name for folder in folders}
    outside = [path for path in root.iterdir() if path.name not in names]
    ignored = Counter("hidden" if _is_hidden(path) else "outside of the class folders" for path in outside)
    files = {}
    for folder in folders:
        own = Counter[str]()
        files[folder.name] = _list_images(folder, own)
        if not files[folder.name]:
            others = f", and {format_ignored(own)} that are ignored" if own else ""
            raise ValueError(
                f"data.path: the class folder {folder} has no image{others}; valid: files ending in "
                f"{', '.join(SUFFIXES)}"
            )
        ignored += own
    if len(folders) == 1 and (inner := _subfolders(folders[0])):
        raise ValueError(
            f"data.path: {root} has the one class folder {folders[0].name}; if the classes are the folders in it, as "
            f"{inner[0].name}, set data.path to {folders[0]}"
        )
    return Listing(files, ignored)


def _list_images(folder: Folder, ignored: Counter[str]) -> list[Folder]:
    """List the image files of a folder at any depth, sorted; count everything else in `ignored`, by the reason."""
    files, pending, seen = [], [folder], set()
    while pending:
        current = pending.pop()
        if isinstance(current, Path):
            if (real := os.path.realpath(current)) in seen:  # a link may lead back
                ignored["folder that was read already"] += 1
                continue
            seen.add(real)
        for path, dangles in _scan(current):
            if _is_hidden(path):
                ignored["hidden"] += 1
            elif dangles:
                ignored["dangling link"] += 1
            elif is_image(path):  # without a question to the file system: a folder may have a million files
                files.append(path)
            elif path.is_dir():
                pending.append(path)
            else:
                ignored[path.suffix.lower() or "without suffix"] += 1
    return sorted(files)


def _scan(folder: Folder) -> Iterator[tuple[Folder, bool]]:
    """Yield (path, whether it is a link to nothing) of what a folder has."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            for entry in entries:
                yield folder / entry.name, entry.is_symlink() and not os.path.exists(entry.path)
    else:
        for path in folder.iterdir():
            yield path, False


def _is_hidden(path: Folder) -> bool:
    """Return whether a file or folder is not meant to be seen; __MACOSX is what macOS adds to its archives."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _subfolders(root: Folder) -> list[Folder]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path))


def _take_part(files: list[Folder], root: Folder, split: str) -> list[Folder]:
    """Return the train or the test images of a class that is not split yet: a fifth, by a hash, is for testing.

    The hash of CLASS/FILE decides for each file by itself, so the answer for a file stays when others are added. Only
    if all files of a class would fall into one part, the file that is nearest to the other part goes there. Raises
    ValueError for a class with one file.
    """
    if len(files) < 2:
        raise ValueError(
            f"data.path: the class folder {root / files[0].relative_to(root).parts[0]} has one image; valid: two or "
            "more, because one is for testing, or folders train/ and test/ beside each other"
        )
    hashes = [_hash_name(file, root) for file in files]
    test = {value for value in hashes if value < 2**64 / 5} or {min(hashes)}
    if len(test) == len(files):
        test.remove(max(hashes))
    return [file for file, value in zip(files, hashes, strict=True) if (value in test) == (split == "test")]


def _hash_name(file: Folder, root: Folder) -> int:
    """Return a number below 2^64 that depends on CLASS/FILE alone.

    It does not depend on the machine: names are brought to NFC, because file systems compose accents differently.
    """
    name = unicodedata.normalize("NFC", file.relative_to(root).as_posix())
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def format_ignored(ignored: Counter[str]) -> str:
    """Return "3 files (2 .txt, 1 hidden)", the most frequent reason first."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ignored.most_common(8))
    count = ignored.total()
    return f"{count:,} file{'' if count == 1 else 's'} ({reasons})"
