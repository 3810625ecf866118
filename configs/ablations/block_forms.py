"""The four forms of a block, at one budget.

    python -m mobilenet_jax.ablate --config configs/ablations/block_forms.py --workdir DIR

Question: at equal multiply-adds, how far does each step from the full convolution to the inverted residual carry?

Paper: 1801.04381 Fig. 2 draws them: regular, separable, separable with linear bottleneck, bottleneck with expansion
layer. The last two are the same layers when stacked, as the caption says: what V2 adds is the residual between
bottlenecks. No figures.

Widths are chosen for images of 32 px so that multiply-adds are those of the base at width .35; channels go by eights,
so that the separable form has half a percent less and the regular form ten percent more. On other images, choose anew.

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
