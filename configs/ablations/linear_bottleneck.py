"""Linear bottlenecks.

    python -m mobilenet_jax.ablate --config configs/ablations/linear_bottleneck.py --workdir DIR

Question: does an activation after the projection, where channels are few, lose information that the next block needs?

Paper: 1801.04381 Fig. 6a shows curves only: V2 with linear bottlenecks is above V2 with ReLU6 in the bottlenecks. The
variant "everywhere" is not in the paper: the sums of the residuals pass through ReLU6 too, so no map is linear.

Found here: the result of the paper holds on Fashion-MNIST, 5 epochs, 3 seeds: linear 90.2%, ReLU6 in the bottleneck
88.4%, everywhere 88.5%. Each linear run is above each other run (docs/studies/linear_bottleneck).
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
