"""Linear bottlenecks.

    python -m mobilenet_jax.ablate --config configs/ablations/linear_bottleneck.py --workdir DIR

Question: does an activation behind the projection, where channels are few, lose information that the next block needs?

Paper: 1801.04381 Fig. 6a shows curves alone: V2 with linear bottlenecks above V2 with ReLU6 in them. "Everywhere" is
not in the paper: there the sums of the residuals pass through ReLU6 too, so that no map of the network is linear.

Found here: it reproduces on Fashion-MNIST, 5 epochs, 3 seeds: linear 90.2%, ReLU6 in the bottleneck 88.4%, everywhere
88.5%; each linear run is above each other one (docs/studies/linear_bottleneck).
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "linear",
        "variants": {
            "linear": {},
            "relu6_in_bottleneck": {"model.projection_activation": "relu6"},
            "relu6_everywhere": {"model.projection_activation": "relu6", "model.sum_activation": "relu6"},
        },
        "source": "1801.04381 Fig. 6a, V2 on ImageNet: curves alone, linear above ReLU6 in the bottleneck",
    }
