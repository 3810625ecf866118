"""The names of tensors in Hugging Face transformers' MobileNetV1 and V2, and the JSON files beside them.

Sources: transformers 4.57 models/mobilenet_v1 and mobilenet_v2: modeling_*.py, configuration_*.py and
image_processing_*.py. The names here are those of the bare model; `recognise.py` removes the prefix of the others.
"""

from mobilenet_jax.models.spec import Spec
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.naming import Entry, Naming
from mobilenet_jax.weights.torch_names import LAYOUT, LEAVES

Layers = dict[str, tuple[str, str]]


def _name_layers(spec: Spec) -> Layers:
    v2 = spec.name == "mobilenet_v2"
    layers = {"stem": "conv_stem.first_conv" if v2 else "conv_stem", "head": "conv_1x1"}
    names = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}
    for i in range(len(spec.blocks)):
        if v2:  # the first block is a part of the stem
            block = f"layer.{i - 1}" if i else "conv_stem"
            layers |= {f"block_{i:02d}/{op}": f"{block}.{name}" for op, name in names.items()}
        else:
            layers |= {f"block_{i:02d}/depthwise": f"layer.{2 * i}", f"block_{i:02d}/pointwise": f"layer.{2 * i + 1}"}
    named = {path: (f"{name}.convolution", f"{name}.normalization") for path, name in layers.items()}
    return {**named, "hidden": ("", ""), "classifier": ("classifier", "")}


TRANSFORMERS = Naming(
    framework="transformers",
    entries=(
        Entry("mobilenet_v1", "mobilenet_v1", "timm_tf", HALF),
        Entry("mobilenet_v2", "mobilenet_v2", "timm_tf", HALF),
    ),
    name_layers=_name_layers,
    leaves=LEAVES,
    layout=LAYOUT,
    percent=False,
)
