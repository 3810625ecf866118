"""Where residuals go.

    python -m mobilenet_jax.ablate --config configs/ablations/shortcut.py --workdir DIR

Question: should shortcuts join the narrow bottlenecks or the wide expansions, and are they worth having?

Paper: 1801.04381 Fig. 6b shows curves alone: between bottlenecks above between expansions above none.

Found here: bottlenecks first, on Fashion-MNIST, 5 epochs, 3 seeds: 90.2% against 88.2% without shortcuts. Expansions
are not above none: 86.7%, and 88.4% without the average that spoils one of the runs (docs/studies/shortcut).
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "bottleneck",
        "variants": {
            "bottleneck": {},
            "expansion": {"model.shortcut": "expansion"},
            "none": {"model.shortcut": "none"},
        },
        "source": "1801.04381 Fig. 6b, V2 on ImageNet: curves alone, bottlenecks above expansions above none",
    }
