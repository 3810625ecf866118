"""The input by tf.data: only an Inception crop is decoded, then resized bilinearly and flipped; uint8 out."""

import time
from pathlib import Path

from protocol import Run, serve


def load(case: dict) -> tuple[Run, dict]:
    """Load a pipeline over the folder's files, with a private pool of as many threads as our side has cores."""
    import tensorflow as tf  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    size, threads = case["resolution"], case["threads"]
    files = sorted(map(str, Path(case["images"]).glob("train/*/*.jpg")))

    def make_example(path, label):
        data = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BILINEAR)
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8), label

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    dataset = (
        tf.data.Dataset.from_tensor_slices((files, [0] * len(files)))
        .shuffle(len(files))
        .repeat()
        .map(make_example, num_parallel_calls=threads)
        .batch(case["batch_size"], drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )

    def run(batches: int) -> float:
        iterator = iter(dataset)
        next(iterator)
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        return time.perf_counter() - start

    return run, {"versions": {"tensorflow": tf.__version__}}


if __name__ == "__main__":
    serve(load)
