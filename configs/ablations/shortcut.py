"""Where residuals go.

    python -m mobilenet_jax.ablate --config configs/ablations/shortcut.py --workdir DIR

Question: should shortcuts join the narrow bottlenecks or the wide expansions, and are they worth having?

Paper: 1801.04381 Fig. 6b shows curves alone: between bottlenecks above between expansions above none.

Found here: not run at length.
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
