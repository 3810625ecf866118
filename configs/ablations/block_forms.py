"""The four forms of a block at equal cost.

    python -m mobilenet_jax.ablate --config configs/ablations/block_forms.py --workdir DIR

Question: at equal multiply-adds, how much accuracy does each step from the full convolution to the inverted residual
gain?

Paper: 1801.04381 Fig. 2 draws the four forms: regular, separable, separable with linear bottleneck, bottleneck with
expansion layer. When stacked, the last two have the same layers, as the caption says; V2 adds the residual between
bottlenecks. The paper gives no numbers.

For images of 32 px, the widths give each form the multiply-adds of the base at width .35. Channels are multiples of
eight, so the separable form has half a percent less and the regular form ten percent more. Images of another size need
other widths.

Found here: not run at length.
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "inverted_residual",
        "variants": {
            "regular": {"model.block_form": "regular", "model.width": 0.4},
            "separable": {"model.block_form": "separable", "model.width": 0.89},
            "linear_bottleneck": {"model.block_form": "linear_bottleneck"},
            "inverted_residual": {},
        },
        "source": "1801.04381 Fig. 2: the forms; no figures",
    }
