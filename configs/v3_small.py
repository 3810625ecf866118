"""MobileNet V3-Small.

    python -m mobilenet_jax.main --config configs/v3_small.py            digits, about a minute on two cores
    python -m mobilenet_jax.main --config configs/v3_small.py:imagenet   the paper's recipe, a TPU v3-32

Data sets: digits, fashion_mnist, cifar10, uc_merced, folder (data.path), imagenet. Expected on ImageNet: 67.4% top-1
(1905.02244, Table 3), not yet reproduced by this code.
"""

from typing import Any

from configs import base, datasets, v3_large


def get_config(dataset: str = "digits"):
    config: Any = base.get_config()
    config.model.name = "mobilenet_v3_small"
    config.model.dropout = 0.2  # sec. 6.1.1 says "0.8", the share kept
    if dataset == "imagenet":
        v3_large.train_on_imagenet(config)  # the paper has one recipe for both
    datasets.apply(config, dataset)
    return config
