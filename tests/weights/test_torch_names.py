import json

import pytest
from safetensors.numpy import load_file

from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION


@pytest.mark.parametrize(
    ("naming", "model", "count", "tensors"),
    [
        # Counts: a convolution and four of its norm, an SE gate four, a dense layer two; published state dicts have
        # one more a norm. Shapes as in torchvision 0.29.1 and timm 1.0.31.
        (
            TORCHVISION,
            "mobilenet_v2",
            52 * 5 + 2,
            {"features.17.conv.2.weight": (320, 960, 1, 1), "classifier.1.bias": (1000,)},
        ),
        (TORCHVISION, "mobilenet_v3_large", 46 * 5 + 8 * 4 + 4, {"features.4.block.2.fc1.weight": (24, 72, 1, 1)}),
        (TIMM, "mobilenet_v1", 27 * 5 + 2, {"blocks.3.5.conv_pw.weight": (512, 512, 1, 1)}),
        (
            TIMM,
            "mobilenet_v3_small",
            34 * 5 + 9 * 4 + 4,
            {"conv_head.bias": (1024,), "blocks.5.0.conv.weight": (576, 96, 1, 1)},
        ),
        (TIMM, "mobilenet_v4_hybrid_medium", 536, {"blocks.2.6.attn.key.down_conv.weight": (160, 1, 3, 3)}),
        (TIMM, "mobilenet_edgetpu_v2_m", 267, {"blocks.1.1.conv_exp.weight": (256, 16, 3, 3), "bn2.weight": (1344,)}),
    ],
)
def test_names_and_shapes(naming, model, count, tensors):
    slots = naming.list_slots(make_spec(model, convention=naming.framework))
    assert {name: slots[name].shape for name in tensors} == tensors
    assert len(slots) == count


@pytest.mark.parametrize("case", ["timm_v4_hybrid_medium", "timm_v1_100", "torchvision_v3_small_100"])
def test_names_are_those_of_the_frameworks_file_in_any_order(reference, case):
    folder = reference / "fixtures" / case
    meta = json.loads((folder / "meta.json").read_text())
    naming = {"timm": TIMM, "torchvision": TORCHVISION}[meta["framework"]]
    (entry,) = naming.select(meta["name"])[0]
    slots = naming.list_slots(make_spec(entry.model, num_classes=10, convention=entry.convention))
    tensors = {n: t for n, t in load_file(folder / "weights.safetensors").items() if "num_batches_tracked" not in n}
    assert {name: slot.shape for name, slot in slots.items()} == {name: t.shape for name, t in tensors.items()}
