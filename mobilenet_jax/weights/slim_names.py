"""The names of variables in TensorFlow-Slim, the code of the papers, and TensorFlow's layout.

Source: tensorflow/models research/slim nets/mobilenet_v1.py, mobilenet/mobilenet_v2.py, mobilenet/mobilenet_v3.py and
mobilenet/conv_blocks.py. Padding is SAME, and the epsilon of batch norm is .001. The averages of the published
checkpoints are read by `tensorflow.py`.
"""

from mobilenet_jax.models.spec import Spec
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.naming import Entry, Layout, Naming

Layers = dict[str, tuple[str, str]]


def _name_layers(spec: Spec) -> Layers:
    if spec.name == "mobilenet_v1":
        return _name_v1(spec)
    scope = "MobilenetV2" if spec.name == "mobilenet_v2" else "MobilenetV3"
    layers = {"stem": "Conv", "head": "Conv_1", "hidden": "Conv_2", "classifier": "Logits/Conv2d_1c_1x1"}
    for i in range(len(spec.blocks)):
        block = f"expanded_conv_{i}" if i else "expanded_conv"
        layers |= {f"block_{i:02d}/{op}": f"{block}/{op}" for op in ("expand", "depthwise", "project")}
        layers |= {
            f"block_{i:02d}/se/reduce": f"{block}/squeeze_excite/Conv",
            f"block_{i:02d}/se/expand": f"{block}/squeeze_excite/Conv_1",
        }
    return {path: (f"{scope}/{name}", f"{scope}/{name}/BatchNorm") for path, name in layers.items()}


def _name_v1(spec: Spec) -> Layers:
    layers = {"stem": "Conv2d_0", "hidden": "", "classifier": "Logits/Conv2d_1c_1x1"}
    for i in range(len(spec.blocks)):
        layers |= {f"block_{i:02d}/{op}": f"Conv2d_{i + 1}_{op}" for op in ("depthwise", "pointwise")}
    return {path: (f"MobilenetV1/{name}", f"MobilenetV1/{name}/BatchNorm") for path, name in layers.items()}


_V3 = ("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v3_large_minimalistic", "mobilenet_v3_small_minimalistic")
SLIM = Naming(
    framework="slim",
    entries=tuple(Entry(model, model, "timm_tf", HALF) for model in ("mobilenet_v1", "mobilenet_v2", *_V3)),
    name_layers=_name_layers,
    leaves={
        "kernel": "/weights",
        "depthwise": "/depthwise_weights",
        "bias": "/biases",
        "norm/scale": "/gamma",
        "norm/bias": "/beta",
        "norm/mean": "/moving_mean",
        "norm/var": "/moving_variance",
    },
    # Kernels are [height, width, inputs, outputs]; depthwise kernels are [height, width, channels, 1].
    layout=Layout(conv=(0, 1, 2, 3), depthwise=(0, 1, 3, 2), dense=(0, 1), outputs=-1),
    percent=False,
    all_convs=True,
)
