import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.speed.photographs import draw_noise, load_sources, write_photographs


def read(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "train" / "photographs").iterdir())]


def test_folder_has_different_jpegs_of_the_documented_size_and_quality(tmp_path):
    about = write_photographs(tmp_path / "a", 6)
    files = read(tmp_path / "a")
    assert len(set(files)) == about["count"] == 6
    assert about["mean_bytes"] == round(sum(map(len, files)) / 6)
    reference = tmp_path / "92.jpg"
    Image.new("RGB", (8, 8)).save(reference, quality=92)
    for file in sorted((tmp_path / "a" / "train" / "photographs").iterdir()):
        with Image.open(file) as image, Image.open(reference) as other:
            assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
            assert image.quantization == other.quantization  # pyright: ignore[reportAttributeAccessIssue]


def test_same_photographs_every_time(tmp_path):
    for name in "ab":
        write_photographs(tmp_path / name, 3)
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_large_photographs_have_as_much_detail_in_a_pixel(tmp_path):
    small = write_photographs(tmp_path / "small", 5)
    large = write_photographs(tmp_path / "large", 5, (1600, 1200))
    for file in sorted((tmp_path / "large" / "train" / "photographs").iterdir()):
        with Image.open(file) as image:
            assert image.size == (1600, 1200)
    # An enlarged photograph would take a third of the bytes for each pixel.
    pixels = 1600 * 1200 / (500 * 375)
    assert 0.7 < large["mean_bytes"] / small["mean_bytes"] / pixels < 1.4


def test_photographs_of_installed_packages_are_used(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "sklearn")
    sources = load_sources()
    assert sorted(sources) == ["china", "flower"]
    assert {image.size for image in sources.values()} == {(640, 427)}


def test_noise_is_used_if_no_package_has_photographs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [(name, image.size) for name, image in load_sources().items()] == [("synthetic", (640, 480))]


def test_noise_has_the_spectrum_of_photographs():
    grey = draw_noise(np.random.default_rng(0), 256, 256).astype(float).mean(axis=-1)
    power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
    band = (frequency > 0.02) & (frequency < 0.5)
    slope, _ = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)
    # An amplitude of 1/f is a power of 1/f^2.
    assert slope == pytest.approx(-2, abs=0.1)
