"""The position of hard-swish in the network.

    python -m mobilenet_jax.ablate --config configs/ablations/h_swish.py --workdir DIR

Question: does hard-swish instead of ReLU help, and from which layer on?

Paper: 1905.02244 Table 5, V3-Large: ReLU 74.5%; h-swish from 16 channels on 75.4%, from 112 on 75.0%, from 80 on, as
released, 75.2%. Here stem and last layers have h-swish, except in "relu"; the paper does not say what they have.

Found here: not run at length.
"""

from configs import datasets, v3_large


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v3_large.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "from_80",
        "variants": {
            "relu": {"model.activation": "relu"},
            "from_16": {"model.hard_swish_from": 0},
            "from_80": {},
            "from_112": {"model.hard_swish_from": 10},
        },
        "published": {"relu": 74.5, "from_16": 75.4, "from_80": 75.2, "from_112": 75.0},
        "source": "1905.02244 Table 5, V3-Large on ImageNet",
    }
