"""Where images come from: the embedded digits, TFDS sets, folders, and random pixels.

A source is a sequence of records. It reads an image only when that record is asked for; `decode.py` decodes it.
"""

import importlib.resources
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mobilenet_jax.data.decode import UnreadableImageError
from mobilenet_jax.data.folders import format_ignored, list_split

SPLITS = ("train", "test", "holdout")


class Record(NamedTuple):
    """One labelled image, as it is stored: encoded images are not decoded yet."""

    image: np.ndarray | bytes | Path  # uint8[H, W, 3], or the bytes or the path of an image file
    label: int  # index into the source's class_names
    name: str  # for messages: its file, or its data set and number


class Source(Protocol):
    """A split of a data set: a picklable sequence of records."""

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def is_encoded(source: Source) -> bool:
    """Return whether the images of a source are files or their bytes, not pixels."""
    return not isinstance(source[0].image, np.ndarray)


class DataInfo(NamedTuple):
    """Facts about the data that a run needs before it reads any image."""

    num_classes: int
    class_names: tuple[str, ...]
    train_count: int  # training images, without the holdout
    eval_count: int  # evaluation images


def open_source(data_config, split: str) -> Source:
    """Open a split of config.data.source.

    `holdout` is the share data.holdout of the training images. It has the same images for every seed of a run. `train`
    is the rest. `test` of a TFDS set is its test split, or its validation split if there is no test split or its labels
    are withheld. `test` of a folder is its folder test, or its folder val, or otherwise about a fifth of each class,
    chosen by a hash (see `folders.list_split`).

    Args:
      data_config: config.data of configs/base.py.
      split: train | test | holdout.

    Raises:
      ValueError: a source that is unknown, not prepared, empty or malformed.
      FileNotFoundError: data.path is not a folder.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; valid: {', '.join(SPLITS)}")
    source = _open(data_config, "test" if split == "test" else "train")
    return source if split == "test" else _part(source, split, data_config.holdout)


def _open(data_config, split: str) -> Source:
    kind, _, argument = data_config.source.partition(":")
    if kind not in SOURCES:
        raise ValueError(f"data.source is {data_config.source!r}; valid: digits, tfds:NAME, folder, fake:N")
    return SOURCES[kind](data_config, argument, split)


def eval_split(data_config) -> str:
    """Return the split of evaluation: holdout if data.holdout is above 0, otherwise test."""
    return "holdout" if data_config.holdout > 0 else "test"


class Splits(NamedTuple):
    """The open splits of a run. It opens them once, because listing a large folder takes minutes."""

    train: Source
    evaluation: Source

    def describe(self) -> DataInfo:
        """Return classes and counts, without reading images."""
        train, evaluation = self
        return DataInfo(len(train.class_names), train.class_names, len(train), len(evaluation))


def open_splits(data_config) -> Splits:
    """Open the splits of training and evaluation of config.data.

    Raises:
      ValueError, FileNotFoundError: as `open_source` raises them.
    """
    share, whole = data_config.holdout, _open(data_config, "train")
    train = _part(whole, "train", share)
    evaluation = _part(whole, "holdout", share) if share > 0 else _open(data_config, "test")
    return Splits(train, evaluation)


def describe(data_config) -> DataInfo:
    """Return classes and counts of config.data, without reading images.

    Raises:
      ValueError, FileNotFoundError: as `open_source` raises them.
    """
    return open_splits(data_config).describe()


def describe_split(source: Source) -> str:
    """Describe a split in one line: images, classes and, for a folder, the smallest class and what was ignored."""
    text = f"{source.name}: {len(source):,} images in {len(source.class_names):,} classes"
    whole, indices = (source.whole, source.indices) if isinstance(source, _Part) else (source, range(len(source)))
    if not isinstance(whole, _Folder):
        return text
    counts = Counter(whole.get_label(int(index)) for index in indices)
    count, name = min((counts[label], name) for label, name in enumerate(source.class_names))
    ignored = f"; ignored: {format_ignored(whole.ignored)}" if whole.ignored else ""
    return f"{text}, the smallest class is {name} with {count:,}{ignored}"


class _Part:
    """The records of a source at the given indices."""

    def __init__(self, source: Source, indices: np.ndarray, *, name: str):
        self.name, self.class_names = name, source.class_names
        self.whole, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.indices[index])]


def _part(source: Source, split: str, share: float) -> Source:
    if share == 0 and split == "train":
        return source
    # RandomState, because its streams never change; the streams of Generator may.
    order = np.random.RandomState(0).permutation(len(source))
    count = round(share * len(source))
    if not 0 < count < len(source):
        raise ValueError(
            f"data.holdout is {share!r}, which holds out {count} and leaves {len(source) - count} of the {len(source)} "
            f"images of {source.name}; valid: a share at which neither is 0"
        )
    indices = np.sort(order[:count] if split == "holdout" else order[count:])
    return _Part(source, indices, name=f"{source.name} ({split})")


class _Digits:
    """The 1,797 8x8 digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits).

    The stored split is sklearn's train_test_split(test_size=0.2, stratify=labels, random_state=0): 1,437 training and
    360 test images.
    """

    def __init__(self, data_config, argument: str, split: str):
        if argument:
            raise ValueError(f"data.source is 'digits:{argument}'; valid: digits, which takes no argument")
        with importlib.resources.files("mobilenet_jax.data").joinpath("digits.npz").open("rb") as file:
            stored = np.load(file)
            chosen = stored["is_test"] == (split == "test")
            grey, self._labels = stored["images"][chosen], stored["labels"][chosen]
        # The 17 grey levels 0..16 become 0..255.
        self._images = np.round(grey[..., None].repeat(3, axis=-1) * (255 / 16)).astype(np.uint8)
        self.name = f"digits {split}"
        self.class_names = tuple(str(i) for i in range(10))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], int(self._labels[index]), f"{self.name} image {index}")


class _Fake:
    """Random images of data.image_size pixels and data.num_classes classes, which depend only on split and index."""

    def __init__(self, data_config, argument: str, split: str):
        if not argument.isdecimal() or int(argument) == 0:
            raise ValueError(f"data.source is 'fake:{argument}'; valid: fake:N with a count N of at least 1")
        if data_config.num_classes < 1:
            raise ValueError(f"data.num_classes is {data_config.num_classes!r}; valid: at least 1")
        self.name = f"fake {split}"
        self.class_names = tuple(f"class {i}" for i in range(data_config.num_classes))
        self._count, self._size, self._stream = int(argument), data_config.image_size, int(split == "test")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self._stream, index))
        label = int(rng.integers(len(self.class_names)))
        image = rng.integers(256, size=(self._size, self._size, 3), dtype=np.uint8)
        return Record(image, label, f"{self.name} image {index}")


class _Folder:
    """Image files in one folder per class, on a disk or in a bucket."""

    def __init__(self, data_config, argument: str, split: str):
        if argument:
            raise ValueError(f"data.source is 'folder:{argument}'; valid: folder, with the path in data.path")
        files, self.ignored = list_split(data_config.path, split)
        self.name = f"{data_config.path} {split}"
        self.class_names = tuple(files)
        self._files = [(file, label) for label, paths in enumerate(files.values()) for file in paths]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file, label = self._files[index]
        if isinstance(file, Path):
            return Record(file, label, str(file))
        try:
            return Record(file.read_bytes(), label, str(file))
        except OSError as error:
            raise UnreadableImageError(f"{file} cannot be read: {error}") from error

    def get_label(self, index: int) -> int:
        """Return the label of an image without reading the image."""
        return self._files[index][1]


class _Tfds:
    """A split of a prepared TFDS set, read record by record from its array_record files."""

    def __init__(self, data_config, argument: str, split: str):
        builder = _find_builder(argument, data_config.data_dir)
        image, label = _find_features(argument, builder.info)
        self._image_key, self._label_key = image, label
        self.class_names = tuple(builder.info.features[label].names)
        wanted = ("train",) if split == "train" else ("test", "validation")
        present = [name for name in wanted if name in builder.info.splits]
        for name in present:
            self.name = f"{argument} {name}"
            self._records = _read_split(builder, name, image)
            # Some sets withhold the labels of their test split and store -1 (imagenet2012).
            if len(self._records) and self[0].label >= 0:
                return
        problem = (
            f"{' and '.join(present)} holds 0 labelled records" if present else f"there is no {' or '.join(wanted)}"
        )
        raise ValueError(
            f"data.source is 'tfds:{argument}', where {problem}; valid: a set with records in a split named "
            f"{' or '.join(wanted)} (it has {', '.join(builder.info.splits)}; data.holdout evaluates on a share of "
            "train)"
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        name = f"{self.name} record {index}"
        try:
            record = self._records[index]
        except (RuntimeError, OSError, IndexError) as error:  # array_record's readers raise these
            raise UnreadableImageError(f"{name} cannot be read: {error}") from error
        image, label = record[self._image_key], record[self._label_key]
        if image is None:  # TFDS makes this of the empty answer of a reader without records
            raise UnreadableImageError(f"{name} cannot be read: its file holds fewer records than listed")
        return Record(image, int(label), name)


def _find_builder(name: str, data_dir: str) -> Any:
    """Return the TFDS builder of a set that is prepared under data_dir."""
    if "://" in data_dir:
        raise ValueError(
            f"data.data_dir is {data_dir!r}, where array_record finds no records; valid: a local folder with a copy of "
            "the set, or a bucket that is mounted with gcsfuse"
        )
    # Imported here because it is slow and only this source needs it.
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        # Reads only the files: the code that generates a set is not needed, and may import TensorFlow.
        return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except registered.DatasetNotFoundError as error:
        to = f" --data_dir={data_dir}" if data_dir else ""
        raise ValueError(
            f"data.source is 'tfds:{name}', which is not prepared in {data_dir or 'the default folder of TFDS'}; "
            f"prepare it with `pip install tensorflow` and `tfds build {name} --file_format=array_record{to}` "
            "(training itself needs no TensorFlow)"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"data.source is 'tfds:{name}'; valid: tfds:NAME, tfds:NAME/CONFIG, tfds:NAME:VERSION"
        ) from error


def _find_features(name: str, info: Any) -> tuple[str, str]:
    """Return the keys of a set's image and class label."""
    import tensorflow_datasets as tfds

    features = dict(info.features)
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    keys = tuple(info.supervised_keys or (*images[:1], *labels[:1]))
    if len(keys) < 2 or keys[0] not in images or keys[1] not in labels:
        raise ValueError(
            f"data.source is 'tfds:{name}', which has the features {', '.join(features)}; valid: a set with an Image "
            "and a ClassLabel"
        )
    return keys[0], keys[1]


def _read_split(builder: Any, split: str, image_key: str) -> Any:
    """Open the records of a split; their images stay encoded."""
    import tensorflow_datasets as tfds

    if builder.info.splits[split].num_examples == 0:
        return ()
    try:
        return builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:  # prepared in a format without random access
        folder = Path(builder.data_dir)
        raise ValueError(
            f"data.source: {folder} holds {builder.info.file_format.value} files, which cannot be read at random; "
            f"convert them with `pip install tensorflow` and `tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record` (training itself needs no TensorFlow)"
        ) from error


# {KIND of data.source "KIND:ARGUMENT": function of (config.data, ARGUMENT, train | test) that opens the source}.
SOURCES: dict[str, Callable[[Any, str, str], Source]] = {
    "digits": _Digits,
    "tfds": _Tfds,
    "folder": _Folder,
    "fake": _Fake,
}
