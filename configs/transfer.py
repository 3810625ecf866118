"""Train a classifier of your own images from pretrained weights.

    python -m mobilenet_jax.main --config configs/transfer.py:folder --config.data.path=DIR --config.init=WEIGHTS

WEIGHTS is a file, the workdir of a run, or a name such as torchvision/mobilenet_v2. The card of the weights defines the
network and the preprocessing; the classifier is new. The word after the comma, as in `:folder,probe`, chooses the
layers to train:

    probe     the classifier, on features computed once without augmentation: a minute or two for a thousand images
    frozen    the classifier, on augmented images that pass through the frozen network at each step
    finetune  the classifier for 3 epochs, then all layers, each at .8 of the learning rate of the next layer

Data sets: folder (data.path; finetune by default), uc_merced (frozen by default), digits (finetune by default, for
weights of a run at 32 px).
"""

from typing import Any

from ml_collections.config_dict import placeholder

from configs import base


def get_config(variant: str = "folder"):
    dataset, _, phases = variant.partition(",")
    if dataset not in DATASETS:
        raise ValueError(f"there is no variant {dataset!r}; valid: {', '.join(DATASETS)}")
    phases = phases or ("frozen" if dataset == "uc_merced" else "finetune")
    if phases not in PHASES:
        raise ValueError(f"there is no way to train {phases!r}; valid: {', '.join(PHASES)}")
    config: Any = base.get_config()
    config.name = f"transfer_{dataset}_{phases}"
    _follow_the_weights(config)
    DATASETS[dataset](config)
    PHASES[phases](config)
    if dataset == "uc_merced":
        config.train.epochs = 20.0  # of the published protocol
    return config


def _follow_the_weights(config) -> None:
    """Leave network and preprocessing to the card of the weights."""
    config.model.name = placeholder(str)
    config.model.width = placeholder(float)
    config.model.convention = placeholder(str)
    config.data.image_size = placeholder(int)
    config.data.crop_share = placeholder(float)
    config.data.interpolation = placeholder(str)
    config.data.squash = placeholder(bool)
    config.data.mean = placeholder(tuple)
    config.data.std = placeholder(tuple)


# The layers to train.

ALL_BUT_THE_CLASSIFIER = ("^(?!classifier/)",)


def _train_the_classifier(config, *, epochs: float) -> None:
    """Set what probe, frozen and finetune share; the values were chosen on held-out clip art."""
    config.optim.freeze = ALL_BUT_THE_CLASSIFIER
    config.optim.name = "adamw"
    config.optim.lr_per_256 = 4e-3
    config.optim.weight_decay = 0.01
    config.train.epochs = epochs
    config.train.eval_every_epochs = 5.0
    config.train.save_every_epochs = 5.0


def _probe(config) -> None:
    _train_the_classifier(config, epochs=30.0)
    config.train.freeze_stats = True
    config.train.cache_features = True
    config.data.crop = "resize"
    config.data.flip = False


def _frozen(config) -> None:
    _train_the_classifier(config, epochs=15.0)
    config.train.freeze_stats = True


def _finetune(config) -> None:
    _train_the_classifier(config, epochs=12.0)
    config.train.eval_every_epochs = 3.0
    config.optim.freeze_epochs = 3.0
    config.optim.layer_decay = 0.8  # not tuned
    config.optim.clip_norm = 5.0
    config.train.recompute_stats_epochs = 1.0
    config.train.label_smoothing = 0.1
    config.ema.decay = 0.99


PHASES = {"probe": _probe, "frozen": _frozen, "finetune": _finetune}


# The data sets.


def _augment(config, *, batch_size: int) -> None:
    data = config.data
    data.batch_size = batch_size
    data.eval_batch_size = 64
    data.crop = "inception"
    data.area_range = (0.35, 1.0)  # with few images, smaller crops may lose the class
    data.flip = True


def _folder(config) -> None:
    config.data.source = "folder"
    _augment(config, batch_size=64)


def _uc_merced(config) -> None:
    """Land use: 2,100 aerial photographs of 256 px in 21 classes, from TFDS; 70% for training and 30% for testing.

    The published protocol: a frozen MobileNetV2 1.0 at 224 px, 26,901 trained parameters (1280 * 21 + 21), 20 epochs.
    It reports 93.6%, which this code has not reproduced. It does not state optimizer, batch size and augmentation.
    """
    config.data.source = "tfds:uc_merced"
    config.data.holdout = 0.3
    _augment(config, batch_size=32)
    config.data.image_size = 224


def _digits(config) -> None:
    config.data.source = "digits"
    config.model.stride_one = (0,)  # as in other recipes for small images
    config.data.batch_size = 64
    config.data.crop = "pad"
    config.data.pad = 3


DATASETS = {"folder": _folder, "uc_merced": _uc_merced, "digits": _digits}
