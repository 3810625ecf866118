"""Name what is on a folder of photographs with ONNX Runtime and Pillow: FILE.onnx FOLDER THREADS; prints CSV.

Threads decode the next batch while the network computes one.
"""

import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

_SIZE, _RESIZED, _BATCH = 224, 256, 32


def read(path: Path) -> np.ndarray:
    """Return float32 [224, 224, 3] in -1 ... 1: the shorter side resized to 256 pixels, then the centre."""
    with Image.open(path) as image:
        scale = _RESIZED / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (width - _SIZE) // 2, (height - _SIZE) // 2
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized.crop((left, top, left + _SIZE, top + _SIZE)), np.float32)
    return pixels / 127.5 - 1


def main() -> None:
    """Print the five most probable classes of each image."""
    file, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    batches = [files[start : start + _BATCH] for start in range(0, len(files), _BATCH)]
    writer = csv.writer(sys.stdout)
    writer.writerow(("path", "rank", "class", "probability"))
    with ThreadPoolExecutor(threads) as pool:
        following = pool.map(read, batches[0])
        for paths, after in zip(batches, [*batches[1:], []], strict=True):
            images = np.stack(list(following))
            following = pool.map(read, after)
            logits = session.run(None, {given: images})[0]
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            for path, row in zip(paths, shares, strict=True):
                best = np.argsort(-row)[:5]
                writer.writerows((path, rank, k, row[k]) for rank, k in enumerate(best, start=1))


if __name__ == "__main__":
    main()
