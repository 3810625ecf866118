"""Photographs of animals, buildings and things, out of the Debian package gcompris-qt-data.

    apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb package
    python -m benchmarks.gcompris package PHOTOGRAPHS

PHOTOGRAPHS gets the folders `calibrate` and `test` with PNG files, every second photograph in each. The activities of
GCompris keep their pictures as WebP inside of Qt's resource files; drawings and small pictures are left out.
"""

import argparse
import io
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# The activities whose opaque pictures are photographs.
ACTIVITIES = ("categorization", "erase", "explore_farm_animals", "explore_world_animals")
_SMALLEST = 200  # pixels of a side


def read_pictures(data: bytes) -> Iterator[Image.Image]:
    """Yield the opaque pictures of a Qt resource file, in order, that have at least 200 pixels on each side."""
    for match in re.finditer(b"RIFF(....)WEBP", data, re.DOTALL):
        (length,) = struct.unpack("<I", match[1])
        image = Image.open(io.BytesIO(data[match.start() : match.start() + 8 + length]))
        if image.mode == "RGB" and min(image.size) >= _SMALLEST:
            yield image


def extract(package: Path, out: Path) -> int:
    """Write the photographs of an unpacked package; return how many there are.

    Raises FileNotFoundError, in one sentence, for a folder without the activities.
    """
    count = 0
    for activity in ACTIVITIES:
        files = sorted(package.rglob(f"{activity}.rcc"))
        if not files:
            raise FileNotFoundError(f"{package} has no {activity}.rcc; unpack the package with dpkg -x")
        for image in read_pictures(files[0].read_bytes()):
            folder = out / ("calibrate", "test")[count % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{activity}_{count:03d}.png")
            count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gcompris", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="the folder that dpkg -x wrote")
    parser.add_argument("out", type=Path, help="the folder of the photographs")
    flags = parser.parse_args(argv)
    try:
        print(f"{extract(flags.package, flags.out)} photographs")
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
