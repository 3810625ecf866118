"""Write cases for `benchmarks/parity.py`: MobileNets of Hugging Face transformers, with random weights and logits.

    TRANSFORMERS_VENV/bin/python benchmarks/transformers_cases.py CASES
    python benchmarks/parity.py CASES

It runs in an environment with transformers and PyTorch, and needs nothing of this package.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

# For each case, the class and what its config changes.
CASES: dict[str, tuple[str, dict]] = {
    "v1_025": ("MobileNetV1", {"depth_multiplier": 0.25, "num_labels": 11}),
    "v1_075": ("MobileNetV1", {"depth_multiplier": 0.75, "num_labels": 5}),
    "v2_035": ("MobileNetV2", {"depth_multiplier": 0.35, "num_labels": 11}),
    "v2_100_with_background": ("MobileNetV2", {"num_labels": 1001}),
    "v2_140": ("MobileNetV2", {"depth_multiplier": 1.4, "num_labels": 3}),
    "v2_stride_16": ("MobileNetV2", {"depth_multiplier": 0.5, "num_labels": 3, "output_stride": 16}),
    "v2_stride_8": ("MobileNetV2", {"depth_multiplier": 0.5, "num_labels": 3, "output_stride": 8}),
    "v2_symmetric": ("MobileNetV2", {"depth_multiplier": 0.5, "num_labels": 3, "tf_padding": False}),
    "v2_relu": ("MobileNetV2", {"depth_multiplier": 0.5, "num_labels": 3, "hidden_act": "relu"}),
}
SIZE = 96  # pixels


def write_case(folder: Path, family: str, changes: dict) -> None:
    """Write a folder with the model as `save_pretrained` writes it, meta.json, and an input with its logits."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(image_size=SIZE, **changes)
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # so that no batch norm is the identity
                module.running_mean.uniform_(-0.5, 0.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        logits = model(images).logits.numpy()
    model.save_pretrained(folder)
    if changes["num_labels"] == 1001:  # `load_weights` drops the first class, the background
        logits = logits[:, 1:]
    np.savez(folder / "case.npz", input=images.permute(0, 2, 3, 1).numpy(), logits=logits)
    meta = {"framework": "transformers", "name": f"mobilenet_{family[-2:].lower()}", "weights": ["."]}
    (folder / "meta.json").write_text(json.dumps({**meta, "version": transformers.__version__}))


def main() -> None:
    """Write all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder for the cases")
    folder = parser.parse_args().folder
    for name, (family, changes) in CASES.items():
        write_case(folder / name, family, changes)
        print(folder / name)


if __name__ == "__main__":
    main()
