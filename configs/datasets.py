"""The settings of each data set: its images and, for small data sets, a training recipe that fits them.

Every recipe file calls `apply`. On `imagenet`, the training of the paper, set in the recipe file, stays.
"""


def apply(config, dataset: str) -> None:
    """Set the data section and, for small data sets, the training. Raises ValueError for an unknown name."""
    if dataset not in DATASETS:
        raise ValueError(f"there is no variant {dataset!r}; valid: {', '.join(DATASETS)}")
    config.name = f"{config.model.name}_{dataset}"
    DATASETS[dataset](config)


def _short_training(config, *, epochs: float) -> None:
    """Set a recipe for short runs on small data sets. All networks share it; its values were chosen on digits."""
    config.optim.name = "sgd"
    config.optim.nesterov = True
    config.optim.lr_per_256 = 0.4
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = epochs / 10
    config.optim.l2 = 1e-4
    config.optim.decay_rules = (("kernel$", 1.0), (".*", 0.0))
    config.optim.clip_norm = 5.0  # the first gradients of a network with fresh batch norm are large
    config.train.epochs = epochs
    config.model.bn_decay = 0.9  # a short run needs running statistics that adapt quickly
    config.model.init = "he"
    config.ema.decay = 0.99


def shorten(config, dataset: str, *, width: float = 0.35):
    """Make the networks of a study narrow and its runs short, in place, on digits and Fashion-MNIST.

    A study has many runs, and two cores can train on these two data sets. Configs of other data sets stay unchanged.
    The number of classes is set too, so that a plan does not need the data.
    """
    epochs = {"fashion_mnist": 5.0, "digits": 10.0}
    if dataset not in epochs:
        return config
    config.model.width = width
    config.model.num_classes = 10
    config.train.epochs = epochs[dataset]
    config.optim.warmup_epochs = epochs[dataset] / 10
    config.train.keep_checkpoints = 1
    config.data.batch_size = {"fashion_mnist": 128, "digits": 64}[dataset]
    return config


def _digits(config) -> None:
    """Handwritten digits: 1,437 + 360 images of 8x8 px, included in the package; about 90 seconds on two cores."""
    _short_training(config, epochs=20.0)
    config.model.width = 0.5
    config.model.stride_one = (0,)  # at 32 px, the last maps are 2x2
    data = config.data
    data.source = "digits"
    data.image_size = 32
    data.batch_size = 64
    data.crop = "pad"
    data.pad = 3


def _fashion_mnist(config) -> None:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 px, from TFDS; about 15 minutes on two cores."""
    _short_training(config, epochs=10.0)
    config.model.width = 0.5
    config.model.stride_one = (0,)
    config.train.log_every_steps = 100
    config.ema.decay = 0.998
    data = config.data
    data.source = "tfds:fashion_mnist"
    data.image_size = 32
    data.batch_size = 64
    data.eval_batch_size = 500
    data.crop = "pad"
    data.pad = 2
    data.flip = True


def _cifar10(config) -> None:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32 px, from TFDS; needs an accelerator."""
    _short_training(config, epochs=100.0)
    config.model.stride_one = (0, 1)  # the last maps are 4x4
    config.train.label_smoothing = 0.1
    config.train.log_every_steps = 50
    config.ema.decay = 0.999
    data = config.data
    data.source = "tfds:cifar10"
    data.image_size = 32
    data.batch_size = 256
    data.eval_batch_size = 500
    data.crop = "pad"
    data.pad = 4
    data.flip = True


def _uc_merced(config) -> None:
    """UC Merced: 2,100 aerial photographs of 256 px in 21 classes, from TFDS; 30% are held out as test images."""
    _short_training(config, epochs=100.0)
    config.train.label_smoothing = 0.1
    config.train.eval_every_epochs = 5.0
    config.ema.decay = 0.99
    data = config.data
    data.source = "tfds:uc_merced"
    data.holdout = 0.3
    data.image_size = 224
    data.batch_size = 32
    data.eval_batch_size = 64
    data.crop = "inception"
    data.area_range = (0.35, 1.0)  # land use fills the frame; smaller crops may lose the class
    data.flip = True


def _folder(config) -> None:
    """Your own images, in the folder `data.path`; sized for about a thousand images on two cores."""
    _short_training(config, epochs=30.0)
    config.model.width = 0.35
    config.train.label_smoothing = 0.1
    config.train.eval_every_epochs = 5.0
    data = config.data
    data.source = "folder"
    data.image_size = 96
    data.batch_size = 64
    data.crop = "inception"
    data.area_range = (0.35, 1.0)
    data.flip = True
    data.color_jitter = 0.3


def _imagenet(config) -> None:
    """ImageNet: 1,281,167 + 50,000 photographs, from TFDS; the Inception preprocessing that all papers name."""
    data = config.data
    data.source = "tfds:imagenet2012"
    data.image_size = 224
    data.eval_batch_size = 1000
    data.workers = 8  # decoding processes; one decodes about 300 images/s
    data.crop = "inception"
    data.flip = True
    data.crop_share = 0.875  # slim inception_preprocessing.py, preprocess_for_eval
    data.interpolation = "bilinear"
    data.mean = (127.5, 127.5, 127.5)  # slim: x / 127.5 - 1
    data.std = (127.5, 127.5, 127.5)
    config.train.log_every_steps = 100


DATASETS = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "uc_merced": _uc_merced,
    "folder": _folder,
    "imagenet": _imagenet,
}
