"""Narrower against shallower networks.

    python -m mobilenet_jax.ablate --config configs/ablations/shallow_vs_narrow.py --workdir DIR

Question: at equal cost, is a deep and narrow network better than a shallow and wide one?

Paper: 1704.04861 Table 5: width .75 has 68.4% (325 M multiply-adds, 2.6 M parameters), the network without the five
14x14x512 layers 65.3% (307 M, 2.9 M). "full" is the network that both start from, 70.6% (Table 6).

Found here: not run at length.
"""

from configs import datasets, v1


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v1.get_config(dataset), dataset, width=1.0)


def sweep() -> dict:
    return {
        "baseline": "narrow",
        "variants": {
            "narrow": {"model.width": 0.75},
            "shallow": {"model.shallow": True},
            "full": {},
        },
        "published": {"narrow": 68.4, "shallow": 65.3, "full": 70.6},
        "source": "1704.04861 Tables 5 and 6, V1 on ImageNet",
    }
