"""The expansion factor.

    python -m mobilenet_jax.ablate --config configs/ablations/expansion.py --workdir DIR

Question: how much wider than its bottlenecks should the inside of a block be? The cost grows with the factor, so read
accuracy and cost together.

Paper: 1801.04381 uses 6 and has no table. Sec. 4 says that factors between 5 and 10 do about equally well; small
networks prefer lower factors, large networks higher factors.

Found here: not run at length.
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "t_6",
        "variants": {
            "t_1": {"model.expansion": 1.0},
            "t_2": {"model.expansion": 2.0},
            "t_4": {"model.expansion": 4.0},
            "t_6": {},
            "t_8": {"model.expansion": 8.0},
        },
        "source": "1801.04381 sec. 4: factors between 5 and 10 nearly the same; no table",
    }
