"""MobileNet V1.

    python -m mobilenet_jax.main --config configs/v1.py                  digits, about a minute on two cores
    python -m mobilenet_jax.main --config configs/v1.py:imagenet         the paper's recipe, a TPU v3-8 or 8 GPUs

Data sets: digits, fashion_mnist, cifar10, uc_merced, folder (data.path), imagenet. Expected on ImageNet: 70.6% top-1
(1704.04861, Table 6), not yet reproduced by this code.
"""

from typing import Any

from configs import base, datasets


def get_config(dataset: str = "digits"):
    config: Any = base.get_config()
    config.model.name = "mobilenet_v1"
    config.model.dropout = 1e-3  # keep .999: from "V1 slim script"
    if dataset == "imagenet":
        _train_on_imagenet(config)
    datasets.apply(config, dataset)
    return config


def _train_on_imagenet(config) -> None:
    """Set the recipe of row "V1 paper" in the table of published recipes; the paper does not state most values."""
    config.data.batch_size = 4096  # not stated; from "V1/V2 TF official"
    config.model.init = "slim"  # not stated; truncated normal .09, from "V1 slim script"
    config.model.bn_decay = 0.9997  # not stated; from "V1 slim script"
    config.model.bn_epsilon = 1e-3  # not stated; from "V1 slim script"
    optim = config.optim
    optim.name = "rmsprop"  # sec. 3.2, where training is asynchronous
    optim.rms_decay = 0.9  # not stated; from "V2 paper"
    optim.momentum = 0.9  # not stated; from "V2 paper"
    optim.epsilon = 0.002  # not stated; from "V3 slim README"
    optim.lr_per_256 = 0.016  # not stated; .008 for 128 images, from "V1/V2 TF official"
    optim.warmup_epochs = 5.0  # not stated; from "V1/V2 TF official"
    optim.schedule = "staircase"  # not stated; from "V1 slim script" and "V1/V2 TF official"
    optim.decay_factor = 0.94  # not stated; from the same two rows
    optim.decay_epochs = 2.5  # not stated; from the same two rows
    optim.l2 = 4e-5  # not stated; from "V1 slim script"
    # sec. 3.2: "very little or no weight decay on the depthwise filters".
    optim.decay_rules = (("depthwise/conv/kernel$", 0.0), ("kernel$", 1.0), (".*", 0.0))
    config.train.label_smoothing = 0.0  # sec. 3.2: no label smoothing
    config.train.epochs = 500.0  # not stated; from "V1/V2 TF official"
    config.ema.decay = 0.0  # not stated; none in "V1 slim script"
