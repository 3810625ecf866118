"""The position of the residual connections.

    python -m mobilenet_jax.ablate --config configs/ablations/shortcut.py --workdir DIR

Question: should shortcuts connect the narrow bottlenecks or the wide expansions, and do they help at all?

Paper: 1801.04381 Fig. 6b shows curves only: shortcuts between bottlenecks are best, then between expansions, then none.

Found here: on Fashion-MNIST, 5 epochs, 3 seeds, bottlenecks are best: 90.2%, against 88.2% without shortcuts.
Expansions are not above none: they have 86.7%, or 88.4% without averaged parameters, which spoil one of the runs
(docs/studies/shortcut).
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
