"""The gate of squeeze-excite.

    python -m mobilenet_jax.ablate --config configs/ablations/se_gate.py --workdir DIR

Question: does the cheap hard sigmoid cost accuracy compared with the sigmoid that it approximates?

Paper: 1905.02244 sec. 5.2 saw no difference in accuracy between the hard and the smooth versions of its functions; it
has no table. A hard-swish as the gate is a mistake found in other code: it is not bounded by 1.

Found here: not run at length.
"""

from configs import datasets, v3_large


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v3_large.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "hard_sigmoid",
        "variants": {
            "hard_sigmoid": {},
            "sigmoid": {"model.se_gate": "sigmoid"},
            "hard_swish": {"model.se_gate": "hard_swish"},
        },
        "source": "1905.02244 sec. 5.2: no difference seen; no table",
    }
