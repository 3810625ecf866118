"""Squeeze-excite.

    python -m mobilenet_jax.ablate --config configs/ablations/squeeze_excite.py --workdir DIR

Question: how much accuracy do the gates gain, and how wide must their hidden layer be?

Paper: 1905.02244 sec. 5.3 uses a quarter of the expansion, which raised accuracy for few more parameters and no
measurable latency; it has no table.

Found here: not run at length.
"""

from configs import datasets, v3_large


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v3_large.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "quarter",
        "variants": {
            "none": {"model.se_ratio": 0.0},
            "sixteenth": {"model.se_ratio": 0.0625},
            "eighth": {"model.se_ratio": 0.125},
            "quarter": {},
            "half": {"model.se_ratio": 0.5},
        },
        "source": "1905.02244 sec. 5.3: a quarter; no table",
    }
