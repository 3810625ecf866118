"""ReLU6 against ReLU.

    python -m mobilenet_jax.ablate --config configs/ablations/relu6_vs_relu.py --workdir DIR

Question: does the bound of 6, which exists for arithmetic of low precision, cost accuracy in float32?

Paper: 1801.04381 sec. 4 uses ReLU6 because it is robust in arithmetic of low precision; it gives no numbers.

Found here: not run at length.
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "relu6",
        "variants": {
            "relu6": {},
            "relu": {"model.activation": "relu"},
        },
        "source": "1801.04381 sec. 4: robustness in low precision; no figures",
    }
