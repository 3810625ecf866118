import hashlib
import importlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import base
from mobilenet_jax.data import sources
from mobilenet_jax.data.decode import UnreadableImageError, decode_image

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the reference data beside the checkout")


def data_config(**values) -> Any:
    config: Any = base.get_config()
    config.data.update(values)
    return config.data


def pixels(record: sources.Record) -> np.ndarray:
    image = record.image
    return image if isinstance(image, np.ndarray) else decode_image(image, name=record.name)


def write_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


# Digits


def test_digits_are_scikit_learns_with_its_stratified_split():
    datasets = pytest.importorskip("sklearn.datasets")
    model_selection = pytest.importorskip("sklearn.model_selection")
    digits = datasets.load_digits()
    split = model_selection.train_test_split(np.arange(1797), test_size=0.2, stratify=digits.target, random_state=0)
    for name, indices in zip(("train", "test"), split, strict=True):
        source = sources.open_source(data_config(), name)
        indices = np.sort(indices)
        assert [source[i].label for i in range(len(source))] == digits.target[indices].tolist()
        images = np.stack([pixels(source[i]) for i in range(len(source))])
        expected = np.round(digits.images[indices] * 255 / 16)
        np.testing.assert_array_equal(images, np.repeat(expected[..., None], 3, axis=-1))
        assert images.dtype == np.uint8


def test_digits_counts_and_class_shares():
    info = sources.describe(data_config())
    assert info == (10, tuple("0123456789"), 1437, 360)
    train, test = (sources.open_source(data_config(), split) for split in ("train", "test"))
    counts = [np.bincount([source[i].label for i in range(len(source))]) for source in (train, test)]
    assert np.abs(counts[1] - (counts[0] + counts[1]) * 360 / 1797).max() < 1


# Holdout


def test_holdout_and_train_partition_the_training_images_whatever_the_seed():
    whole = sources.open_source(data_config(), "train")
    names = {whole[i].name for i in range(len(whole))}
    config = data_config(holdout=0.1)
    parts = [sources.open_source(config, split) for split in ("train", "holdout")]
    part_names = [[part[i].name for i in range(len(part))] for part in parts]
    assert len(part_names[0]) == 1437 - 144
    assert len(part_names[1]) == 144
    assert set(part_names[0]) | set(part_names[1]) == names
    assert sources.describe(config)[2:] == (1293, 144)
    # Golden: the held-out images. It may change only in a release that says so, because images change their split.
    digest = hashlib.sha256("\n".join(part_names[1]).encode()).hexdigest()
    assert digest == "69415e3f7fd1fb768ff2f663fe198ae0a1ef7c4ae1d1f170e8bd03bf7a11b47a"


def test_holdout_does_not_touch_the_test_split():
    test = sources.open_source(data_config(holdout=0.5), "test")
    assert len(test) == 360


def test_a_holdout_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"^data\.holdout is .*holds out 0 and leaves 1437 of the 1437"):
        sources.open_source(data_config(holdout=1e-6), "holdout")


# Names


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "valid: digits, tfds:NAME, folder, fake:N"),
        ("digits:8", "takes no argument"),
        ("fake:", "fake:N with a count N of at least 1"),
        ("fake:-3", "fake:N with a count N of at least 1"),
        ("fake:0", "fake:N with a count N of at least 1"),
        ("folder:/x", "data.path"),
    ],
)
def test_unknown_sources_are_refused_in_one_sentence(source, message):
    with pytest.raises(ValueError, match=message):
        sources.open_source(data_config(source=source), "train")


def test_unknown_split():
    with pytest.raises(ValueError, match=r"train, test, holdout"):
        sources.open_source(data_config(), "validation")


# Fake


def test_fake_is_a_function_of_split_and_index():
    config = data_config(source="fake:50", image_size=20, num_classes=7)
    train, again, test = (sources.open_source(config, split) for split in ("train", "train", "test"))
    assert sources.describe(config) == (7, tuple(f"class {i}" for i in range(7)), 50, 50)
    for i in (0, 17, 49):
        assert pixels(train[i]).shape == (20, 20, 3)
        assert pixels(train[i]).dtype == np.uint8
        np.testing.assert_array_equal(pixels(train[i]), pixels(again[i]))
        assert train[i].label == again[i].label
        assert not np.array_equal(pixels(train[i]), pixels(test[i]))
    assert {train[i].label for i in range(50)} == set(range(7))
    assert np.mean([pixels(train[i]) for i in range(50)]) == pytest.approx(127.5, abs=1.5)


# Folders


def test_folder_with_splits_prefers_test_and_sorts_classes(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for label in ("zebra", "ant"):
            for i in range(count):
                write_image(tmp_path / split / label / f"{i}.PNG")
    for name in ("notes.txt", "._0.png"):
        (tmp_path / "train" / "ant" / name).write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    config = data_config(source="folder", path=str(tmp_path))
    assert sources.describe(config) == (2, ("ant", "zebra"), 6, 4)
    train = sources.open_source(config, "train")
    assert [train[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert train[5].name == str(tmp_path / "train" / "zebra" / "2.PNG")
    shutil.rmtree(tmp_path / "test")
    assert sources.describe(config).eval_count == 2


def test_folder_suffixes_in_any_case(tmp_path):
    for i, suffix in enumerate((".jpg", ".JPEG", ".Png", ".webp")):
        write_image(tmp_path / "train" / "a" / f"{i}{suffix}")
        write_image(tmp_path / "test" / "a" / f"{i}{suffix}")
    config = data_config(source="folder", path=str(tmp_path))
    source = sources.open_source(config, "train")
    assert len(source) == 4
    for i in range(4):
        assert pixels(source[i]).shape == (8, 8, 3)


def test_one_folder_is_split_by_a_hash_that_new_files_do_not_move(tmp_path):
    for label in ("a", "train"):  # a class may be called train
        for i in range(300):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.jpg").touch()
    config = data_config(source="folder", path=str(tmp_path))

    def names(split):
        source = sources.open_source(config, split)
        return {str(Path(source[i].name).relative_to(tmp_path)) for i in range(len(source))}

    train, test = names("train"), names("test")
    assert not train & test
    assert len(train | test) == 600
    assert len(test) == pytest.approx(120, abs=4 * (600 * 0.2 * 0.8) ** 0.5)
    by_hand = {n for n in train | test if int(hashlib.sha256(n.encode()).hexdigest()[:16], 16) * 5 < 2**64}
    assert test == by_hand
    for i in range(300, 400):
        (tmp_path / "a" / f"{i}.jpg").touch()
    assert train <= names("train")
    assert test <= names("test")


def test_the_hash_does_not_depend_on_how_an_accent_is_composed(tmp_path):
    found = []
    for form in ("NFC", "NFD"):
        folder = tmp_path / form / unicodedata.normalize(form, "caf\u00e9")
        folder.mkdir(parents=True)
        for i in range(100):
            (folder / unicodedata.normalize(form, f"\u00e9{i}.jpg")).touch()
        test = sources.open_source(data_config(source="folder", path=str(tmp_path / form)), "test")
        found.append({unicodedata.normalize("NFC", Path(test[i].name).name) for i in range(len(test))})
    assert found[0] == found[1]
    assert 0 < len(found[0]) < 100


def test_folder_problems_are_one_sentence_each(tmp_path):
    def opening(path, split="train"):
        return sources.open_source(data_config(source="folder", path=str(path)), split)

    with pytest.raises(FileNotFoundError, match=r"^data.path is ''; valid: a folder of train/CLASS"):
        opening("")
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        opening(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no class folders"):
        opening(tmp_path)
    (tmp_path / "one" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty has no image; valid: files ending in .jpg"):
        opening(tmp_path / "one")
    for label in ("a", "b"):
        write_image(tmp_path / "two" / "train" / label / "0.png")
    with pytest.raises(ValueError, match=r"neither test/ nor val/; valid: one of them, or data.holdout"):
        opening(tmp_path / "two", "test")
    assert len(opening(tmp_path / "two")) == 2
    write_image(tmp_path / "two" / "val" / "a" / "0.png")
    write_image(tmp_path / "two" / "val" / "c" / "0.png")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"only one of train/ and val/ has b, c; valid: the same class folders"):
            opening(tmp_path / "two", split)


def tree(root: Path, *names: str) -> Any:
    """Empty files under `root`, and the data section that reads them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return data_config(source="folder", path=str(root))


def list_names(config, split: str) -> list[str]:
    source = sources.open_source(config, split)
    return [Path(source[i].name).relative_to(config.path).as_posix() for i in range(len(source))]


def test_images_are_found_at_any_depth_with_every_suffix_in_any_case(tmp_path):
    images = ["a/1.GIF", "a/2.bmp", "a/b/c/3.JPG", "a/b/4.jpeg", "z/.x/5.png", "z/6.webp", "z/y/7.Png"]
    others = ["a/notes.txt", "a/b/no_suffix", "z/._6.webp", "z/__MACOSX/8.png", "9.png"]
    names = [f"{split}/{name}" for split in ("train", "test") for name in images + others]
    config = tree(tmp_path, *names, "train/__MACOSX/z/1.png", "train/.hidden/1.png")
    (tmp_path / "train" / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "train" / "a" / "b" / "loop").symlink_to(tmp_path / "train" / "a")
    for split in ("train", "test"):
        found = [name.removeprefix(f"{split}/") for name in list_names(config, split)]
        assert found == ["a/1.GIF", "a/2.bmp", "a/b/4.jpeg", "a/b/c/3.JPG", "z/6.webp", "z/y/7.Png"]
    train, test = (sources.describe_split(split) for split in sources.open_splits(config))
    assert train.startswith(f"{tmp_path} train: 6 images in 2 classes, the smallest class is z with 2; ignored: 10 ")
    reasons = "5 hidden, 1 outside of the class folders, 1 .txt, 1 without suffix, 1 dangling link"
    assert set(train.partition("(")[2].strip(")").split(", ")) == {
        *reasons.split(", "),
        "1 folder that was read already",
    }
    assert test.endswith("ignored: 6 files (3 hidden, 1 outside of the class folders, 1 .txt, 1 without suffix)")


@pytest.mark.parametrize("suffix", ["gif", "bmp"])
def test_gif_and_bmp_are_decoded(tmp_path, suffix):
    write_image(tmp_path / "a" / f"0.{suffix}", 255)
    write_image(tmp_path / "a" / f"1.{suffix}", 255)
    source = sources.open_source(data_config(source="folder", path=str(tmp_path)), "train")
    np.testing.assert_array_equal(pixels(source[0]), np.full((8, 8, 3), 255))


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("test", ["test", "Validation", "val", "valid", "testing"])
def test_other_names_of_the_splits(tmp_path, train, test):
    config = tree(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/a/2.png", f"{test}/b/2.png")
    assert list_names(config, "train") == [f"{train}/a/1.png", f"{train}/b/1.png"]
    assert list_names(config, "test") == [f"{test}/a/2.png", f"{test}/b/2.png"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["test/a/1.png", "trainset/a/1.png"], "has test/ but neither train/ nor training/ with class folders"),
        (["photos/a/1.png", "photos/b/1.png"], "photos; if the classes are the folders in it, as a, set data.path to "),
        (["a/1.png", "a/2.png", "b/1.png"], "/b has one image; valid: two or more, because one is for testing"),
        (["a/1.tif", "a/2.tif"], "/a has no image, and 2 files (2 .tif) that are ignored; valid: files ending in .jpg"),
    ],
)
def test_a_folder_that_is_probably_meant_otherwise_is_refused(tmp_path, names, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        sources.open_splits(tree(tmp_path, *names))
    assert "\n" not in str(error.value)


def test_each_class_has_an_image_in_both_parts_and_about_a_fifth_for_testing(tmp_path):
    names = [f"{count}/{i}.png" for count in (2, 3, 5, 200) for i in range(count)]
    config = tree(tmp_path, *names, *(f"many{k}/{i}.png" for k in range(20) for i in range(2)))
    train, test = list_names(config, "train"), list_names(config, "test")
    assert sorted(train + test) == sorted(set(train) | set(test))
    classes = {name.split("/")[0] for name in [*train, *test]}
    assert len(classes) == 24
    assert {name.split("/")[0] for name in train} == {name.split("/")[0] for name in test} == classes
    assert 25 <= sum(name.startswith("200/") for name in test) <= 55


def test_the_holdout_of_a_folder_is_described(tmp_path):
    config = tree(tmp_path, *(f"train/{label}/{i}.png" for label in "ab" for i in range(5)))
    config.holdout = 0.2
    train, held = sources.open_splits(config)
    assert "8 images in 2 classes, the smallest class is" in sources.describe_split(train)
    assert "2 images in 2 classes" in sources.describe_split(held)


def test_sources_in_memory_are_described_by_their_counts():
    assert [sources.describe_split(split) for split in sources.open_splits(data_config())] == [
        "digits train: 1,437 images in 10 classes",
        "digits test: 360 images in 10 classes",
    ]


@needs_shared
def test_clipart_folder():
    info = sources.describe(data_config(source="folder", path=str(SHARED / "data" / "clipart")))
    assert (info.train_count, info.eval_count) == (1150, 417)
    assert info.num_classes == len(info.class_names) == 7


# TFDS


def write_tfds(root: Path, name: str, splits: dict[str, list[tuple[bytes, int]]], *, file_format="array_record"):
    """Write a prepared TFDS set as `tfds build` does, but without TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2

    proto: Any = tf_example_pb2  # its classes are made at import
    array_record = importlib.import_module("array_record.python.array_record_module")

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    info = {"name": name, "version": "1.0.0", "fileFormat": file_format, "moduleName": "none", "splits": []}
    for split, examples in splits.items():
        path = folder / f"{name}-{split}.{file_format}-00000-of-00001"
        writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
        for image, label in examples:
            example = proto.Example()
            example.features.feature["image"].bytes_list.value.append(image)
            example.features.feature["label"].int64_list.value.append(label)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info["splits"].append(
            {
                "name": split,
                "shardLengths": [str(len(examples))],
                "numBytes": "1",
                "filepathTemplate": template,
            }
        )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    feature_module = "tensorflow_datasets.core.features"
    image = {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"}}
    features = {
        "image": {"pythonClassName": f"{feature_module}.image_feature.Image", **image},
        "label": {
            "pythonClassName": f"{feature_module}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
        },
    }
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": f"{feature_module}.features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    return folder


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tfds_config(name: str, data_dir: Path, **values):
    return data_config(source=f"tfds:{name}", data_dir=str(data_dir), **values)


def test_tfds_set_is_read_and_picklable(tmp_path):
    write_tfds(tmp_path, "tiny", {"train": [(png(i), i % 3) for i in range(6)], "validation": [(png(9), 2)]})
    config = tfds_config("tiny", tmp_path)
    assert sources.describe(config) == (3, ("0", "1", "2"), 6, 1)
    source = pickle.loads(pickle.dumps(sources.open_source(config, "train")))
    for i in range(6):
        assert source[i].label == i % 3
        assert source[i].name == f"tiny train record {i}"
        assert (pixels(source[i])[..., 0] == i).all()


def test_tfds_test_split_with_withheld_labels_gives_way_to_validation(tmp_path):
    labelled = [(png(1), 1)] * 2
    write_tfds(tmp_path, "tiny", {"train": labelled, "test": [(png(0), -1)] * 3, "validation": labelled})
    source = sources.open_source(tfds_config("tiny", tmp_path), "test")
    assert source.name == "tiny validation"
    assert len(source) == 2


def test_tfds_without_a_test_split(tmp_path):
    write_tfds(tmp_path, "tiny", {"train": [(png(i), 0) for i in range(10)]})
    with pytest.raises(ValueError, match=r"there is no test or validation; valid: .* .it has train; data.holdout"):
        sources.describe(tfds_config("tiny", tmp_path))
    assert sources.describe(tfds_config("tiny", tmp_path, holdout=0.2))[2:] == (8, 2)


def test_trap_30_zero_records_are_an_error(tmp_path):
    write_tfds(tmp_path, "tiny", {"train": []})
    with pytest.raises(ValueError, match=r"tfds:tiny.*train holds 0 labelled records"):
        sources.open_source(tfds_config("tiny", tmp_path), "train")
    # The listing has more records than the file, as in a bucket that is read without its client.
    listing = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    listing.write_text(listing.read_text().replace('["0"]', '["5"]'))
    with pytest.raises(UnreadableImageError, match=r"tiny train record 0 cannot be read"):
        sources.open_source(tfds_config("tiny", tmp_path), "train")


def test_trap_30_buckets_are_refused():
    with pytest.raises(ValueError, match=r"^data.data_dir is 'gs://b/d'.*gcsfuse"):
        sources.open_source(data_config(source="tfds:mnist", data_dir="gs://b/d"), "train")


def test_trap_30_sets_not_prepared_name_the_command(tmp_path):
    for name in ("cifar10", "coco"):  # without TensorFlow, the code of the second cannot be imported
        with pytest.raises(ValueError, match=r"pip install tensorflow") as info:
            sources.open_source(tfds_config(name, tmp_path), "train")
        assert f"`tfds build {name} --file_format=array_record --data_dir={tmp_path}`" in str(info.value)
        assert "\n" not in str(info.value)


def test_trap_30_tfrecords_name_the_conversion(tmp_path):
    folder = write_tfds(tmp_path, "tiny", {"train": [(png(0), 0)]}, file_format="tfrecord")
    with pytest.raises(ValueError, match=r"tfrecord files, which cannot be read at random") as info:
        sources.open_source(tfds_config("tiny", tmp_path), "train")
    assert f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`" in str(info.value)
    assert "\n" not in str(info.value)


def test_trap_30_no_tensorflow_is_imported(tmp_path):
    write_tfds(tmp_path, "tiny", {"train": [(png(i), 0) for i in range(4)], "test": [(png(1), 1)]})
    code = f"""
import sys
from configs import base
from mobilenet_jax.data import loader
config = base.get_config().data
config.update(source="tfds:tiny", data_dir={str(tmp_path)!r}, batch_size=2)
batches = loader.make_train_iterator(config, seed=0, process_index=0, process_count=1)
assert next(batches)["images"].shape == (2, 32, 32, 3)
batches.close()
evaluation, count = loader.make_eval_batches(config, process_index=0, process_count=1)
assert sum(batch["mask"].sum() for batch in evaluation) == count == 1
assert "tensorflow" not in sys.modules
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_tfds_names_that_are_none_are_refused_in_one_sentence(tmp_path):
    for name in ("", "not a name/1"):
        with pytest.raises(ValueError, match=r"^data.source is 'tfds:.*; valid: tfds:NAME, ") as info:
            sources.open_source(tfds_config(name, tmp_path), "train")
        assert "\n" not in str(info.value)


def test_tfds_versions(tmp_path):
    write_tfds(tmp_path, "tiny", {"train": [(png(0), 0)]})
    assert len(sources.open_source(tfds_config("tiny:1.0.0", tmp_path), "train")) == 1
    with pytest.raises(ValueError, match=r"'tfds:tiny:2.0.0', which is not prepared"):
        sources.open_source(tfds_config("tiny:2.0.0", tmp_path), "train")


def test_missing_shards_are_named_when_the_set_is_opened(tmp_path):
    folder = write_tfds(tmp_path, "tiny", {"train": [(png(0), 0)]})
    next(folder.glob("*array_record-*")).unlink()
    with pytest.raises(UnreadableImageError, match=r"tiny train record 0 cannot be read"):
        sources.open_source(tfds_config("tiny", tmp_path), "train")


@needs_shared
def test_fashion_mnist():
    config = tfds_config("fashion_mnist", SHARED / "data" / "tfds")
    info = sources.describe(config)
    assert info[2:] == (60_000, 10_000)
    assert info.class_names[0] == "T-shirt/top"
    assert info.num_classes == 10
    record = sources.open_source(config, "test")[9_999]
    image = pixels(record)
    assert image.shape == (28, 28, 3)
    assert 0 <= record.label < 10
    assert record.name == "fashion_mnist test record 9999"
