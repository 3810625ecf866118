"""Load damaged weights and images: each must load or be refused in one sentence, without using much time or memory.

    python -m benchmarks.mutate --count=1000

COUNT files of weights and COUNT images, of all formats and forms, are damaged at random from a seed: they are
truncated, or have flipped bits, zeroed or repeated ranges, swapped types, or huge numbers in their headers. Each row of
the table counts the results for one file. The exit code is 1 if a file was neither loaded nor refused, if it took more
than 10 seconds of CPU time or 2 minutes on the clock, or if memory grew by more than a gigabyte.
"""

import argparse
import collections
import io
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.strangers import write_forms
from mobilenet_jax import export_weights, load_weights, save_weights
from mobilenet_jax.data.decode import UnreadableImageError, decode_image
from mobilenet_jax.exporting.contract import is_exported, read_exported
from mobilenet_jax.exporting.runtime import open_classifier
from mobilenet_jax.weights import WeightsError

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
FILES = (
    "torchvision_v2_035/weights.pth",
    "torchvision_v2_035/weights_legacy.pth",
    "torchvision_v2_035/weights.safetensors",
    "keras_v1_025/model.weights.h5",
    "keras_v1_025/legacy_weights.h5",
    "keras_v1_025/model.h5",
    "keras_v1_025/model.keras",
)
# The name of each image and the options with which Pillow writes it.
IMAGES: dict[str, dict] = {
    "grey.png": {"mode": "L"},
    "palette.png": {"mode": "P"},
    "transparent.png": {"mode": "RGBA"},
    "sixteen.png": {"mode": "I;16"},
    "plain.jpg": {"mode": "RGB"},
    "progressive.jpg": {"mode": "RGB", "progressive": True},
    "cmyk.jpg": {"mode": "CMYK"},
    "lossy.webp": {"mode": "RGB"},
    "lossless.webp": {"mode": "RGBA", "lossless": True},
    "palette.gif": {"mode": "P"},
    "plain.bmp": {"mode": "RGB"},
    "other.tiff": {"mode": "RGB"},
}
_CPU_SECONDS, _SECONDS = 10, 120
_BYTES = 1 << 30
# Names of types in the formats. Both of a pair have the same length, so that the bytes after them do not move.
_TYPES = (
    (b"F32", b"F64"),
    (b"F32", b"I32"),
    (b"F32", b"F16"),
    (b"Float", b"Short"),
    (b"Float", b"Dense"),
    (b"torch", b"posix"),
)


def mutate(data: bytes, generator: random.Random) -> bytes:
    """Return the file with one kind of damage, mostly in the first and last 64 kB, where headers are."""
    changed = bytearray(data)

    def place() -> int:
        end = min(1 << 16, len(data))
        return generator.choice(
            [generator.randrange(len(data)), generator.randrange(end), len(data) - 1 - generator.randrange(end)]
        )

    kind = generator.randrange(7)
    if kind == 0:
        return data[: generator.choice([place(), generator.randrange(64)])]
    if kind == 1:
        for _ in range(generator.choice((1, 8, 64, 512))):
            changed[place()] ^= 1 << generator.randrange(8)
    elif kind == 2:
        start = place()
        changed[start : start + generator.choice((1, 8, 4096))] = bytes(generator.choice((1, 8, 4096)))
    elif kind == 3:
        start = place()
        changed[start:start] = changed[start : start + generator.choice((1, 16, 1000))]
    elif kind == 4:
        old, new = generator.choice(_TYPES)
        count = data.count(old)
        return data.replace(old, new, generator.randint(1, count)) if count else data[::-1]
    elif kind == 5:  # a little-endian number
        start = place()
        changed[start : start + 8] = generator.choice((2**31 - 1, 2**63 - 1, 10**12, 2**32 + 5)).to_bytes(8, "little")
    else:  # a number in JSON
        digits = [i for i in range(min(1 << 16, len(data))) if data[i : i + 1].isdigit()] or [0]
        start = generator.choice(digits)
        changed[start : start + 1] = generator.choice((b"99999999999", b"-1", b"1e9", b'"x"', b"null", b"0"))
    return bytes(changed)


def write_image(path: Path) -> None:
    """Write the image of IMAGES that has the name of the path: smooth as a photograph, with EXIF data."""
    options = dict(IMAGES[path.name])
    mode, (y, x) = options.pop("mode"), np.mgrid[:150, :200]
    if mode == "I;16":
        image = Image.fromarray((x * y).astype(np.uint16))
    else:
        image = Image.fromarray(np.stack([x, y, 255 - x, x + y // 2], axis=-1).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = {} if path.suffix in (".gif", ".bmp") else {"exif": exif}
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[path.suffix], **kind, **options)
    path.write_bytes(buffer.getvalue())


def read_image(path: Path) -> None:
    """Read an image as `predict` does."""
    decode_image(path, name=str(path))


def read_weights(path: Path) -> None:
    """Read weights, the folder of a network that a JSON file describes, or an exported file, as `predict` does."""
    if is_exported(path):
        open_classifier(read_exported(path))
    else:
        load_weights(path.parent if (path.parent / "config.json").exists() else path)


def try_file(path: Path, load: Callable[[Path], object] = load_weights) -> str:
    """Return "loaded" or "refused"; raise TimeoutError, and any exception that is not a refusal in one sentence."""

    def stop(*_):
        raise TimeoutError(f"more than {_CPU_SECONDS} s of CPU time, or {_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGPROF, stop)
    signal.alarm(_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    try:
        load(path)
    except (WeightsError, UnreadableImageError) as error:
        if len(str(error).splitlines()) == 1:
            return "refused"
        raise
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "loaded"


def main() -> int:
    """Print the table; return the exit code, 1 if something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=1000, help="number of weights, and of images; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=("weights", "forms", "images"), help="forms: the checkpoints and folders that strangers bring"
    )
    parser.add_argument("--minutes", type=float, default=60, help="of all; default: %(default)s")
    parser.add_argument("--fixtures", type=Path, default=FIXTURES, help="default: %(default)s")
    flags = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "ours.safetensors"
        weights = load_weights(flags.fixtures / FILES[0])
        save_weights(ours, *weights)
        exports = [Path(export_weights(weights, format=kind, out=folder)["file"]) for kind in ("tflite", "onnx")]
        sources = [*(flags.fixtures / file for file in FILES), ours, *exports]
        forms = write_forms(Path(folder))
        images = [Path(folder) / name for name in IMAGES]
        for image in images:
            write_image(image)
        kinds = {"weights": sources, "forms": forms, "images": images}
        # The files that share a count.
        groups = [kinds[flags.only]] if flags.only else [[*sources, *forms], images]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ended = time.monotonic() + flags.minutes * 60
        for source, each in ((source, -(-flags.count // len(group))) for group in groups for source in group):
            data, counts = source.read_bytes(), collections.Counter()
            load = read_image if source in images else read_weights
            for i in range(each):
                if time.monotonic() > ended:
                    print(f"{source.name}: {flags.minutes:g} minutes are over after {i} of them")
                    break
                # A file in a folder is damaged in its place, because others beside it belong to it.
                path = source if source.parent.name == "hub" else Path(folder) / f"mutated{source.suffix}"
                path.write_bytes(mutate(data, random.Random(f"{flags.seed} {source.name} {i}")))
                try:
                    counts[try_file(path, load)] += 1
                except BaseException as error:  # the fault that this program looks for
                    counts["failed"] += 1
                    print(f"{source.name} {i}: {type(error).__name__}: {error}", file=sys.stderr)
            if source in forms:
                source.write_bytes(data)
            failed += counts["failed"]
            print(
                f"{source.name:<24}"
                + "".join(f"{what} {counts[what]:>4}   " for what in ("loaded", "refused", "failed"))
            )
        # HDF5 files are read in child processes.
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before + children)
    print(f"memory grew by at most {grown / 1e6:,.0f} MB")
    return int(failed > 0 or grown > _BYTES)


if __name__ == "__main__":
    sys.exit(main())
