"""Keras' names of tensors, as `conv_dw_1/kernel`, and its layout; they are the same for all its file formats.

Source: Keras 3.15.1 applications/mobilenet.py, mobilenet_v2.py, mobilenet_v3.py. `hdf5.py` puts names in lower case,
and writes the names of older V3 files, as "expanded_conv/expand/BatchNorm", in the way of Keras 3.
"""

from mobilenet_jax.models.spec import Spec
from mobilenet_jax.weights.card import KERAS_EXAMPLE
from mobilenet_jax.weights.naming import Entry, Layout, Naming

Layers = dict[str, tuple[str, str]]


def _with_norm(layers: dict[str, str]) -> Layers:
    return {path: (name, f"{name}_bn") for path, name in layers.items()}


def _name_v1(spec: Spec) -> Layers:
    blocks = range(len(spec.blocks))
    depthwise = {f"block_{i:02d}/depthwise": f"conv_dw_{i + 1}" for i in blocks}
    pointwise = {f"block_{i:02d}/pointwise": f"conv_pw_{i + 1}" for i in blocks}
    return _with_norm({"stem": "conv1", **depthwise, **pointwise, "hidden": "", "classifier": "conv_preds"})


def _name_inverted(spec: Spec, prefix: str) -> dict[str, str]:
    """Return the names in the blocks of V2 and V3; the first block has no number."""
    layers = {}
    for i in range(len(spec.blocks)):
        block = f"{prefix}_{i}" if i else "expanded_conv"
        layers |= {f"block_{i:02d}/{op}": f"{block}_{op}" for op in ("expand", "depthwise", "project")}
        layers[f"block_{i:02d}/se/reduce"] = f"{block}_squeeze_excite_conv"
        layers[f"block_{i:02d}/se/expand"] = f"{block}_squeeze_excite_conv_1"
    return layers


def _name_layers(spec: Spec) -> Layers:
    if spec.name == "mobilenet_v1":
        return _name_v1(spec)
    if spec.name == "mobilenet_v2":
        tail = {"head": "conv_1", "hidden": "", "classifier": "predictions"}
        return {**_with_norm({**_name_inverted(spec, "block"), **tail}), "stem": ("conv1", "bn_conv1")}
    ends = {"stem": "conv", "head": "conv_1", "hidden": "conv_2", "classifier": "logits"}
    return _with_norm({**_name_inverted(spec, "expanded_conv"), **ends})


KERAS = Naming(
    framework="keras",
    entries=(
        Entry("MobileNet", "mobilenet_v1", "keras", KERAS_EXAMPLE),
        Entry("MobileNetV2", "mobilenet_v2", "keras", KERAS_EXAMPLE),
        Entry("MobileNetV3Large", "mobilenet_v3_large", "keras", KERAS_EXAMPLE),
        Entry("MobileNetV3Large", "mobilenet_v3_large_minimalistic", "keras", KERAS_EXAMPLE),
        Entry("MobileNetV3Small", "mobilenet_v3_small", "keras", KERAS_EXAMPLE),
        Entry("MobileNetV3Small", "mobilenet_v3_small_minimalistic", "keras", KERAS_EXAMPLE),
    ),
    name_layers=_name_layers,
    leaves={
        "kernel": "/kernel",
        "bias": "/bias",
        "norm/scale": "/gamma",
        "norm/bias": "/beta",
        "norm/mean": "/moving_mean",
        "norm/var": "/moving_variance",
    },
    # Kernels are [height, width, inputs, outputs]; depthwise kernels are [height, width, channels, 1].
    layout=Layout(conv=(0, 1, 2, 3), depthwise=(0, 1, 3, 2), dense=(0, 1), outputs=-1),
    percent=False,
)
