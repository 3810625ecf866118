"""LiteRT (TensorFlow Lite) with XNNPACK kernels: Keras' MobileNets, converted in float32."""

import os
import time

from keras_worker import list_models
from protocol import Run, UnsupportedError, serve


def load(case: dict) -> tuple[Run, dict]:
    """Load an interpreter and one batch of float32 images, which every step uses; the converter folds batch norm."""
    os.environ["KERAS_BACKEND"] = "tensorflow"  # the converter reads graphs of TensorFlow
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    if case["devices"] > 1:
        raise UnsupportedError("runs on one device")
    size, count = case["resolution"], case["batch_size"]
    make = list_models(tf.keras.applications)[case["name"]]
    shape = (size, size, 3)
    model = make(input_shape=shape, alpha=case["width"], weights=None, classifier_activation=None)
    function = tf.function(lambda images: model(images, training=False))
    concrete = function.get_concrete_function(tf.TensorSpec((count, *shape), tf.float32))
    converted = tf.lite.TFLiteConverter.from_concrete_functions([concrete], model).convert()
    interpreter = tf.lite.Interpreter(model_content=converted, num_threads=case["threads"])
    interpreter.allocate_tensors()
    place = interpreter.get_input_details()[0]["index"]
    answer = interpreter.get_output_details()[0]["index"]
    images = tf.random.uniform((count, *shape), -1, 1, seed=0).numpy()

    def infer(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            interpreter.set_tensor(place, images)
            interpreter.invoke()
            interpreter.get_tensor(answer)
        return time.perf_counter() - start

    return infer, {"versions": {"tensorflow": tf.__version__}}


if __name__ == "__main__":
    serve(load)
