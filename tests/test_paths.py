"""Local paths and URLs: nothing that looks like a URL becomes a local folder."""

import importlib.util
import re
from pathlib import Path

import pytest
from etils import epath

from configs.ablations import shallow_vs_narrow
from mobilenet_jax.data.image_files import list_images
from mobilenet_jax.paths import as_path, check_reachable, is_bucket
from mobilenet_jax.studies.study import Study, find_workdir


@pytest.fixture
def nothing_installed(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gcsfs", "s3fs") else original(name))


@pytest.mark.parametrize("path", ["runs/mine", "/tmp/run", Path("a"), epath.Path("a/b"), "C:", "odd:name", "hf:timm/x"])
def test_local_paths(path):
    assert str(as_path(path)) == str(path)
    assert not is_bucket(as_path(path))


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_paths_in_buckets(url, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    path = as_path(url) / "checkpoints"
    assert str(path) == f"{url}/checkpoints"
    assert is_bucket(path)
    assert as_path(path) == path


@pytest.mark.parametrize(("url", "package"), [("gs://b/x", "gcsfs"), ("s3://b/x", "s3fs")])
def test_without_the_extra_a_sentence_says_what_to_install(nothing_installed, url, package):
    said = f'{url} needs the package {package}; install it with pip install -e ".[cloud]"'
    with pytest.raises(ValueError, match=re.escape(said)):
        as_path(url)


@pytest.mark.parametrize("path", ["http://host/x", "az://b/x", "gs:/b/x", Path("gs://b/x"), "memory://x", "file:///x"])
def test_other_urls_are_refused(path):
    with pytest.raises(ValueError, match=r"is not a path; valid: a local path, gs://BUCKET/FOLDER or s3://"):
        as_path(path)


def test_a_bucket_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def fail(path):
        raise RuntimeError("401, Anonymous caller\nmore lines")

    path = epath.Path("gs://b/x")
    monkeypatch.setattr(type(path), "exists", fail)
    with pytest.raises(OSError, match=r"^gs://b/x cannot be reached: 401, Anonymous caller$"):
        check_reachable(path)


def test_images_in_a_bucket_are_refused():
    with pytest.raises(ValueError, match=r"gs://b/x\.png is a URL; valid: images on a disk"):
        list_images(["gs://b/x.png"])


def test_a_study_in_a_bucket_is_refused():
    config = shallow_vs_narrow.get_config("digits")
    study = Study(name="shallow_vs_narrow", config=config, **shallow_vs_narrow.sweep())
    assert find_workdir(study, None) == Path("runs/ablations/shallow_vs_narrow")
    with pytest.raises(
        ValueError, match=r"--workdir is gs://b/x, and the processes of a study .* valid: a folder on a"
    ):
        find_workdir(study, "gs://b/x")
