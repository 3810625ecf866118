"""The width multiplier.

    python -m mobilenet_jax.ablate --config configs/ablations/width.py --workdir DIR

Question: how much accuracy does a uniformly narrower network lose?

Paper: 1704.04861 Table 6: 70.6, 68.4, 63.7 and 50.6% at widths 1, .75, .5 and .25. Accuracy falls smoothly until .25.

Found here: on Fashion-MNIST, 5 epochs, 3 seeds: 90.4, 89.7, 90.0 and 87.9%. Accuracy breaks at .25, as in the paper;
three seeds cannot show a fall before it (docs/studies/width).
"""

from typing import Any

from configs import datasets, v1


def get_config(dataset: str = "fashion_mnist"):
    config: Any = datasets.shorten(v1.get_config(dataset), dataset, width=1.0)
    config.model.stride_one = ()  # also on small images: with stride 1, width 1 would take four times the work
    return config


def sweep() -> dict:
    return {
        "baseline": "width_1",
        "variants": {
            "width_1": {},
            "width_0.75": {"model.width": 0.75},
            "width_0.5": {"model.width": 0.5},
            "width_0.25": {"model.width": 0.25},
        },
        "published": {"width_1": 70.6, "width_0.75": 68.4, "width_0.5": 63.7, "width_0.25": 50.6},
        "source": "1704.04861 Table 6, V1 on ImageNet at 224 px",
        "figure": "frontier",
    }
