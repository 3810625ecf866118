import json

import pytest

from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights.keras_names import KERAS


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("keras_v1_025", "mobilenet_v1"),
        ("keras_v2_035", "mobilenet_v2"),
        ("keras_v3_large_075", "mobilenet_v3_large"),
        ("keras_v3_small_100", "mobilenet_v3_small"),
        ("keras_v3_small_minimalistic", "mobilenet_v3_small_minimalistic"),
    ],
)
def test_layers_have_keras_names_shapes_and_order(reference, case, model):
    meta = json.loads((reference / "fixtures" / case / "meta.json").read_text())
    norm = ("gamma", "beta", "moving_mean", "moving_variance")
    expected = {
        f"{layer.lower()}/{leaf}": tuple(shape)
        for _, layer, kind, shapes in meta["weights_h5_order"]
        for leaf, shape in zip(norm if kind == "BatchNormalization" else ("kernel", "bias"), shapes, strict=False)
    }
    spec = make_spec(model, width=meta["width"], num_classes=10, convention="keras")
    # The order too: older files are read by it.
    assert [(name, slot.shape) for name, slot in KERAS.list_slots(spec).items()] == list(expected.items())
