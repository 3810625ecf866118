"""The names of tensors in torchvision and timm, and PyTorch's layout.

Sources: torchvision 0.29.1 models/mobilenetv2.py, mobilenetv3.py; timm 1.0.31 models/mobilenetv3.py,
efficientnet.py and _efficientnet_blocks.py. They also state the preprocessing of the published weights.
"""

from dataclasses import replace

from mobilenet_jax.models.spec import (
    Conv,
    FusedInvertedResidual,
    InvertedResidual,
    MultiQueryAttention,
    Row,
    Separable,
    Spec,
    UniversalInverted,
)
from mobilenet_jax.weights.card import HALF, IMAGENET, Preprocessing
from mobilenet_jax.weights.naming import Entry, Layout, Naming

LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "gamma": ".gamma",  # layer scale
    "norm/scale": ".weight",
    "norm/bias": ".bias",
    "norm/mean": ".running_mean",
    "norm/var": ".running_var",
}
# Kernels are [outputs, inputs of a group, height, width]; dense kernels are [outputs, inputs].
LAYOUT = Layout(conv=(2, 3, 1, 0), depthwise=(2, 3, 1, 0), dense=(1, 0), outputs=0)

Layers = dict[str, tuple[str, str]]


def _name_torchvision(spec: Spec) -> Layers:
    """Return names as `features.I`: a convolution and its norm are .0 and .1, but V2's projection lies in `conv`."""
    is_v2 = spec.name == "mobilenet_v2"
    layers = {}
    for i, (name, row, channels) in enumerate(spec.rows()):
        if isinstance(row, Conv):
            layers[name] = (f"features.{i}.0", f"features.{i}.1")
            continue
        for j, op in enumerate(op.name for op in row.ops(channels)):
            prefix = f"features.{i}.{'conv' if is_v2 else 'block'}.{j}"
            if op == "se":
                layers[f"{name}/se/reduce"] = (f"{prefix}.fc1", "")
                layers[f"{name}/se/expand"] = (f"{prefix}.fc2", "")
            elif is_v2 and op == "project":
                layers[f"{name}/project"] = (prefix, f"features.{i}.conv.{j + 1}")
            else:
                layers[f"{name}/{op}"] = (f"{prefix}.0", f"{prefix}.1")
    return {**layers, "hidden": ("classifier.0", ""), "classifier": ("classifier.1" if is_v2 else "classifier.3", "")}


# The numbers of rows in timm's stages, `blocks.STAGE.ROW`.
_STAGES = {
    "mobilenet_v1": (1, 2, 2, 6, 2),
    "mobilenet_v1_headconv": (1, 2, 2, 6, 2),
    "mobilenet_v2": (1, 2, 3, 4, 3, 3, 1),
    "mobilenet_v2_deep_x1.2": (1, 3, 4, 5, 4, 4, 1),
    "mobilenet_v2_deep_x1.4": (1, 3, 5, 6, 5, 5, 1),
    "mobilenet_v3_large": (1, 2, 3, 4, 2, 3),
    "mobilenet_v3_large_minimalistic": (1, 2, 3, 4, 2, 3),
    "mobilenet_v3_small": (1, 2, 3, 2, 3),
    "mobilenet_v3_small_minimalistic": (1, 2, 3, 2, 3),
    "mobilenet_v4_conv_small": (2, 2, 6, 6),
    "mobilenet_v4_conv_medium": (1, 2, 8, 11),
    "mobilenet_v4_conv_aa_medium": (1, 2, 8, 11),
    "mobilenet_v4_conv_blur_medium": (1, 2, 8, 11),
    "mobilenet_v4_conv_large": (1, 2, 11, 13),
    "mobilenet_v4_conv_aa_large": (1, 2, 11, 13),
    "mobilenet_v4_hybrid_medium": (1, 2, 12, 16),
    "mobilenet_v4_hybrid_large": (1, 2, 15, 18),
    "mobilenet_edgetpu_100": (1, 4, 4, 4, 4, 4, 1),
    **dict.fromkeys([f"mobilenet_edgetpu_v2_{size}" for size in ("xs", "s", "m", "l")], (1, 2, 4, 4, 4, 4, 1)),
}
_HIDDEN = ("mobilenet_v3", "mobilenet_v4")  # the networks with a hidden layer, which not every file has
_SQUEEZE_EXCITE = {"se/reduce": ("se.conv_reduce", ""), "se/expand": ("se.conv_expand", "")}
_SEPARABLE = {"depthwise": ("conv_dw", "bn1"), "pointwise": ("conv_pw", "bn2")}
_UNEXPANDED = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2"), **_SQUEEZE_EXCITE}
_INVERTED = {
    "expand": ("conv_pw", "bn1"),
    "depthwise": ("conv_dw", "bn2"),
    "project": ("conv_pwl", "bn3"),
    **_SQUEEZE_EXCITE,
}
_FUSED = {"expand": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")}
_UNIVERSAL = {
    "start/depthwise": ("dw_start.conv", "dw_start.bn"),
    "expand": ("pw_exp.conv", "pw_exp.bn"),
    "depthwise": ("dw_mid.conv", "dw_mid.bn"),
    "project": ("pw_proj.conv", "pw_proj.bn"),
    "layer_scale": ("layer_scale", ""),
}
_ATTENTION = {
    "": ("", "norm"),
    "query/project": ("attn.query.proj", ""),
    "key/depthwise": ("attn.key.down_conv", "attn.key.norm"),
    "key/project": ("attn.key.proj", ""),
    "value/depthwise": ("attn.value.down_conv", "attn.value.norm"),
    "value/project": ("attn.value.proj", ""),
    "output/project": ("attn.output.proj", ""),
    "layer_scale": ("layer_scale", ""),
}


def _name_timm(spec: Spec) -> Layers:
    stages = _STAGES[spec.name]
    places = [f"blocks.{stage}.{i}" for stage, rows in enumerate(stages) for i in range(rows)]
    last = f"blocks.{len(stages)}.0"
    layers = {
        "stem": ("conv_stem", "bn1"),
        # In V3 and V4, timm's head is the layer after the pooling, and our head is its last stage.
        "head": (f"{last}.conv", f"{last}.bn1") if spec.name.startswith(_HIDDEN) else ("conv_head", "bn2"),
        "hidden": ("conv_head", "norm_head"),
        "classifier": ("classifier", ""),
    }
    for i, (row, place) in enumerate(zip(spec.blocks, places, strict=True)):
        for op, (conv, norm) in _name_timm_block(row).items():
            layers[f"block_{i:02d}/{op}".removesuffix("/")] = (f"{place}.{conv}", f"{place}.{norm}")
    return layers


def _name_timm_block(row: Row) -> Layers:
    if isinstance(row, InvertedResidual):
        return _INVERTED if row.expands else _UNEXPANDED
    return {
        Conv: {"": ("conv", "bn1")},
        Separable: _SEPARABLE,
        FusedInvertedResidual: _FUSED,
        UniversalInverted: _UNIVERSAL,
        MultiQueryAttention: _ATTENTION,
    }[type(row)]


TORCHVISION = Naming(
    framework="torchvision",
    entries=(
        Entry("mobilenet_v2", "mobilenet_v2", "torchvision", IMAGENET),
        Entry("mobilenet_v3_large", "mobilenet_v3_large", "torchvision", IMAGENET),
        Entry("mobilenet_v3_small", "mobilenet_v3_small", "torchvision", IMAGENET),
    ),
    name_layers=_name_torchvision,
    leaves=LEAVES,
    layout=LAYOUT,
    percent=False,
)
_BICUBIC, _HALF_BICUBIC = replace(IMAGENET, interpolation="bicubic"), replace(HALF, interpolation="bicubic")
_CROP_95 = replace(_BICUBIC, crop_share=0.95)
_CROP_90 = replace(_BICUBIC, crop_share=0.9)
TIMM = Naming(
    framework="timm",
    entries=(
        Entry("mobilenetv1", "mobilenet_v1", "timm", _HALF_BICUBIC),
        Entry("mobilenetv1_100h", "mobilenet_v1_headconv", "timm", _HALF_BICUBIC, 1.0),
        Entry("mobilenetv2", "mobilenet_v2", "timm", _BICUBIC),
        Entry("mobilenetv2_110d", "mobilenet_v2_deep_x1.2", "timm", _BICUBIC, 1.1),
        Entry("mobilenetv2_120d", "mobilenet_v2_deep_x1.4", "timm", _BICUBIC, 1.2),
        Entry("mobilenetv3_large", "mobilenet_v3_large", "timm", _BICUBIC),
        Entry("mobilenetv3_small", "mobilenet_v3_small", "timm", _BICUBIC),
        Entry("tf_mobilenetv3_large", "mobilenet_v3_large", "timm_tf", HALF),
        Entry("tf_mobilenetv3_small", "mobilenet_v3_small", "timm_tf", HALF),
        Entry("tf_mobilenetv3_large_minimal", "mobilenet_v3_large_minimalistic", "timm_tf", HALF),
        Entry("tf_mobilenetv3_small_minimal", "mobilenet_v3_small_minimalistic", "timm_tf", HALF),
        Entry("mobilenetv4_conv_small", "mobilenet_v4_conv_small", "timm", _BICUBIC, 1.0),
        Entry("mobilenetv4_conv_medium", "mobilenet_v4_conv_medium", "timm", replace(_CROP_95, image_size=256), 1.0),
        Entry("mobilenetv4_conv_large", "mobilenet_v4_conv_large", "timm", replace(_CROP_95, image_size=384), 1.0),
        Entry(
            "mobilenetv4_hybrid_medium", "mobilenet_v4_hybrid_medium", "timm", replace(_CROP_95, image_size=256), 1.0
        ),
        Entry("mobilenetv4_hybrid_large", "mobilenet_v4_hybrid_large", "timm", replace(_CROP_95, image_size=384), 1.0),
        Entry(
            "mobilenetv4_conv_aa_medium", "mobilenet_v4_conv_aa_medium", "timm", replace(_CROP_95, image_size=256), 1.0
        ),
        Entry(
            "mobilenetv4_conv_aa_large", "mobilenet_v4_conv_aa_large", "timm", replace(_CROP_95, image_size=448), 1.0
        ),
        Entry("mobilenetv4_conv_blur_medium", "mobilenet_v4_conv_blur_medium", "timm", _CROP_95, 1.0),
        Entry("mobilenet_edgetpu", "mobilenet_edgetpu_100", "timm", _CROP_90),
        Entry("mobilenet_edgetpu_v2_xs", "mobilenet_edgetpu_v2_xs", "timm", _CROP_90, 1.0),
        Entry("mobilenet_edgetpu_v2_s", "mobilenet_edgetpu_v2_s", "timm", _CROP_90, 1.0),
        Entry("mobilenet_edgetpu_v2_m", "mobilenet_edgetpu_v2_m", "timm", replace(_HALF_BICUBIC, crop_share=0.9), 1.0),
        Entry("mobilenet_edgetpu_v2_l", "mobilenet_edgetpu_v2_l", "timm", _CROP_90, 1.0),
    ),
    name_layers=_name_timm,
    leaves=LEAVES,
    layout=LAYOUT,
    percent=True,
)
# Exceptions, by the start of the file's SHA-256 or by name. torchvision's IMAGENET1K_V2 weights expect images resized
# to 232 px. timm trained its narrow V4 and its wide V1 with other preprocessing than the rest of their families.
PUBLISHED_PREPROCESSING: dict[str, Preprocessing] = {
    **dict.fromkeys(("7ebf99e0", "5c1a4163"), replace(IMAGENET, crop_share=224 / 232)),
    **dict.fromkeys(("timm/mobilenetv4_conv_small_035", "timm/mobilenetv4_conv_small_050"), _HALF_BICUBIC),
    "timm/mobilenetv1_125": replace(_HALF_BICUBIC, crop_share=0.9),
}
