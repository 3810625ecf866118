"""Separable convolutions against full convolutions.

    python -m mobilenet_jax.ablate --config configs/ablations/depthwise_vs_standard.py --workdir DIR

Question: how much accuracy is lost if a depthwise and a pointwise convolution replace each full convolution, at an
eighth of the cost?

Paper: 1704.04861 Table 4: full convolutions 71.7% with 4,866 M multiply-adds and 29.3 M parameters, separable ones
70.6% with 569 M and 4.2 M.

Found here: not run at length.
"""

from configs import datasets, v1


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v1.get_config(dataset), dataset, width=0.25)


def sweep() -> dict:
    return {
        "baseline": "separable",
        "variants": {
            "separable": {},
            "standard": {"model.block_form": "regular"},
        },
        "published": {"separable": 70.6, "standard": 71.7},
        "source": "1704.04861 Table 4, V1 on ImageNet",
    }
