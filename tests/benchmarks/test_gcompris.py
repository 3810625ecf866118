"""Photographs are found inside of Qt's resource files."""

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks.gcompris import ACTIVITIES, main


def webp(size: tuple[int, int], mode: str, level: int) -> bytes:
    file = io.BytesIO()
    bands = len(mode)
    Image.fromarray(np.full((*size, bands), level, np.uint8), mode).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_opaque_pictures_of_enough_pixels_are_dealt_out_in_turn(tmp_path, capsys):
    for n, activity in enumerate(ACTIVITIES):
        parts = [webp((200, 210), "RGB", 10 * n), webp((199, 300), "RGB", 1), webp((300, 300), "RGBA", 2)]
        (tmp_path / f"{activity}.rcc").write_bytes(b"qres" + b"name".join(parts) + b"RIFF")
    assert main([str(tmp_path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "4 photographs\n"
    levels = {folder: [] for folder in ("calibrate", "test")}
    for folder, found in levels.items():
        for path in sorted((tmp_path / "out" / folder).iterdir()):
            image = np.asarray(Image.open(path))
            assert image.shape == (200, 210, 3)
            found += np.unique(image).tolist()
    assert levels == {"calibrate": [0, 20], "test": [10, 30]}


@pytest.mark.parametrize("activity", ["categorization"])
def test_a_folder_that_is_not_the_package_is_refused(tmp_path, capsys, activity):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{tmp_path} has no {activity}.rcc; unpack the package with dpkg -x\n"
