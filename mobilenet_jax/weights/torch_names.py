"""torchvision's and timm's names, and PyTorch's layout.

Sources: torchvision 0.29.1 models/mobilenetv2.py, mobilenetv3.py; timm 1.0.31 models/mobilenetv3.py,
efficientnet.py and _efficientnet_blocks.py; the preprocessing is that of the published weights there.
"""

from dataclasses import replace

from mobilenet_jax.models.spec import Conv, InvertedResidual, Row, Spec
from mobilenet_jax.weights.card import HALF, IMAGENET, Preprocessing
from mobilenet_jax.weights.naming import Entry, Layout, Naming

_LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "norm/scale": ".weight",
    "norm/bias": ".bias",
    "norm/mean": ".running_mean",
    "norm/var": ".running_var",
}
# Kernels are [outputs, inputs of a group, height, width]; dense ones [outputs, inputs].
_LAYOUT = Layout(conv=(2, 3, 1, 0), depthwise=(2, 3, 1, 0), dense=(1, 0), outputs=0)

Layers = dict[str, tuple[str, str]]


def _name_torchvision(spec: Spec) -> Layers:
    """`features.I`: a convolution and its norm are .0 and .1; V2's projection and norm stand alone in `conv`."""
    is_v2 = spec.name == "mobilenet_v2"
    layers = {}
    for i, (name, row, channels) in enumerate(spec.rows()):
        if isinstance(row, Conv):
            layers[name] = (f"features.{i}.0", f"features.{i}.1")
            continue
        ops = [op.name for op in row.ops(channels) if op.name != "se/expand"]
        for j, op in enumerate(ops):
            prefix = f"features.{i}.{'conv' if is_v2 else 'block'}.{j}"
            if op == "se/reduce":
                layers[f"{name}/se/reduce"] = (f"{prefix}.fc1", "")
                layers[f"{name}/se/expand"] = (f"{prefix}.fc2", "")
            elif is_v2 and op == "project":
                layers[f"{name}/project"] = (prefix, f"features.{i}.conv.{j + 1}")
            else:
                layers[f"{name}/{op}"] = (f"{prefix}.0", f"{prefix}.1")
    return {**layers, "hidden": ("classifier.0", ""), "classifier": ("classifier.1" if is_v2 else "classifier.3", "")}


# Rows of timm's stages `blocks.STAGE.ROW`: a line of the paper's table in V2, a resolution and width in the others.
_STAGES = {
    "mobilenet_v1": (1, 2, 2, 6, 2),
    "mobilenet_v2": (1, 2, 3, 4, 3, 3, 1),
    "mobilenet_v3_large": (1, 2, 3, 4, 2, 3),
    "mobilenet_v3_small": (1, 2, 3, 2, 3),
}


def _name_timm(spec: Spec) -> Layers:
    stages = _STAGES[spec.name.removesuffix("_minimalistic")]
    places = [f"blocks.{stage}.{i}" for stage, rows in enumerate(stages) for i in range(rows)]
    last = f"blocks.{len(stages)}.0"
    head = ("conv_head", "bn2") if spec.name == "mobilenet_v2" else (f"{last}.conv", f"{last}.bn1")
    layers = {"stem": ("conv_stem", "bn1"), "head": head, "hidden": ("conv_head", ""), "classifier": ("classifier", "")}
    for i, (row, place) in enumerate(zip(spec.blocks, places, strict=True)):
        for op, (conv, norm) in _name_timm_block(row).items():
            layers[f"block_{i:02d}/{op}"] = (f"{place}.{conv}", f"{place}.{norm}")
    return layers


def _name_timm_block(row: Row) -> Layers:
    gates = {"se/reduce": ("se.conv_reduce", ""), "se/expand": ("se.conv_expand", "")}
    if isinstance(row, InvertedResidual) and row.expands:
        body = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
        return {**body, **gates}
    last = "project" if isinstance(row, InvertedResidual) else "pointwise"
    return {"depthwise": ("conv_dw", "bn1"), last: ("conv_pw", "bn2"), **gates}


TORCHVISION = Naming(
    framework="torchvision",
    entries=(
        Entry("mobilenet_v2", "mobilenet_v2", "torchvision", IMAGENET),
        Entry("mobilenet_v3_large", "mobilenet_v3_large", "torchvision", IMAGENET),
        Entry("mobilenet_v3_small", "mobilenet_v3_small", "torchvision", IMAGENET),
    ),
    name_layers=_name_torchvision,
    leaves=_LEAVES,
    layout=_LAYOUT,
    percent=False,
)
_BICUBIC = replace(IMAGENET, interpolation="bicubic")
TIMM = Naming(
    framework="timm",
    entries=(
        Entry("mobilenetv1", "mobilenet_v1", "timm", replace(HALF, interpolation="bicubic")),
        Entry("mobilenetv2", "mobilenet_v2", "timm", _BICUBIC),
        Entry("mobilenetv3_large", "mobilenet_v3_large", "timm", _BICUBIC),
        Entry("mobilenetv3_small", "mobilenet_v3_small", "timm", _BICUBIC),
        Entry("tf_mobilenetv3_large", "mobilenet_v3_large", "timm_tf", HALF),
        Entry("tf_mobilenetv3_small", "mobilenet_v3_small", "timm_tf", HALF),
        Entry("tf_mobilenetv3_large_minimal", "mobilenet_v3_large_minimalistic", "timm_tf", HALF),
        Entry("tf_mobilenetv3_small_minimal", "mobilenet_v3_small_minimalistic", "timm_tf", HALF),
    ),
    name_layers=_name_timm,
    leaves=_LEAVES,
    layout=_LAYOUT,
    percent=True,
)
# By the start of the file's SHA-256: torchvision's IMAGENET1K_V2 weights are for images resized to 232 px.
PUBLISHED_PREPROCESSING: dict[str, Preprocessing] = dict.fromkeys(
    ("7ebf99e0", "5c1a4163"), replace(IMAGENET, crop_share=224 / 232)
)
