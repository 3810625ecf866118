"""Reads the pooling and the images of a saved Keras model from the configuration inside it."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import KERAS_EXAMPLE, Preprocessing

_NODES_LIMIT = 1_000_000
_ASSUMED = "images are prepared as Keras' preprocess_input does, because the file does not say how"


def read_preprocessing(config: str, *, drop: bool) -> tuple[Preprocessing, list[str]]:
    """Return (preprocessing, notes) of a saved model.

    The image size is the input layer's. A layer `Rescaling` replaces the usual normalisation. `config` is the JSON of
    the model, empty for a file of weights alone; `drop` says that the layers behind the pooling are not used.

    Raises WeightsError if the model pools by the maximum: no network here does.
    """
    preprocessing, notes = KERAS_EXAMPLE, [_ASSUMED]
    try:
        layers = list(_list_layers(json.loads(config))) if config else []
        if not drop and any(kind.startswith("GlobalMaxPooling") for kind, _ in layers):
            raise WeightsError('its pooling takes the maximum, not the mean; classifier="drop" loads it without')
        scales = [layer for kind, layer in layers if kind == "Rescaling"]
        if len(scales) == 1:
            scale, offset = (_triple(scales[0][key]) for key in ("scale", "offset"))
            mean = tuple(-o / s for o, s in zip(offset, scale, strict=True))
            preprocessing = replace(preprocessing, mean=mean, std=tuple(1 / s for s in scale))
            notes = []
        shapes = [layer.get("batch_shape") or layer.get("batch_input_shape") for _, layer in layers]
        sizes = {shape[1] for shape in shapes if isinstance(shape, list) and len(shape) == 4 and shape[1] == shape[2]}
        if len(sizes) == 1 and isinstance(size := sizes.pop(), int):
            preprocessing = replace(preprocessing, image_size=size)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"the configuration of its model cannot be used: {error}") from error
    return preprocessing, notes


def _list_layers(config: Any) -> Iterator[tuple[str, dict]]:
    """Yield (class, configuration) of every layer, at any depth."""
    queue, count = deque([config]), 0
    while queue:
        value, count = queue.popleft(), count + 1
        if count > _NODES_LIMIT:
            raise ValueError(f"it has more than {_NODES_LIMIT:,} values")
        if isinstance(value, list):
            queue.extend(value)
        elif isinstance(value, dict):
            if isinstance(value.get("class_name"), str) and isinstance(value.get("config"), dict):
                yield value["class_name"], value["config"]
            queue.extend(value.values())


def _triple(value: Any) -> tuple[float, float, float]:
    numbers = value if isinstance(value, list) else [value] * 3
    first, second, third = map(float, numbers)
    return first, second, third
