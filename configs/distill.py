r"""A small network that learns from a larger one: V3-Small with a teacher.

    python -m mobilenet_jax.main --config configs/v3_large.py --workdir=runs/teacher
    python -m mobilenet_jax.main --config configs/distill.py --config.train.distill.weights=runs/teacher

    python -m mobilenet_jax.main --config configs/transfer.py:folder --config.data.path=DIR \
        --config.data.image_size=128 --config.init=torchvision/mobilenet_v2 --workdir=runs/teacher
    python -m mobilenet_jax.main --config configs/distill.py:folder --config.data.path=DIR \
        --config.train.distill.weights=runs/teacher

Data sets: digits (the teacher above is V3-Large of width 0.5), folder (data.path; the teacher above is torchvision's
V2, fine-tuned on the same images). The teacher may be anything that `load_weights` takes, with the classes of the data.
docs/distillation.md has the method.
"""

from typing import Any

from configs import v3_small


def get_config(dataset: str = "digits"):
    if dataset not in DATASETS:
        raise ValueError(f"there is no variant {dataset!r}; valid: {', '.join(DATASETS)}")
    config: Any = v3_small.get_config(dataset)
    config.name = f"distill_{dataset}"
    DATASETS[dataset](config)
    _match_functions(config)
    return config


def _match_functions(config) -> None:
    """Set the method of 2106.05237, "function matching": mixed images, and the answers of the teacher alone.

    The paper also trains much longer than usual. The lengths here suit two cores.
    """
    config.train.distill.weights = "runs/teacher"
    config.train.distill.divergence = "kl"
    config.train.distill.temperature = 1.0  # not tuned here
    config.train.distill.weight = 1.0  # no labels
    config.train.label_smoothing = 0.0  # for weights below 1, and for the student alone
    config.data.mixup = 1.0  # a uniform share, which is Beta(1, 1)
    config.model.dropout = 0.0  # not stated; the student is too small to overfit


def _digits(config) -> None:
    config.model.width = 0.1  # 152,482 parameters; the teacher above has 1,421,714


def _folder(config) -> None:
    config.model.width = 0.35
    config.data.image_size = 128
    config.train.epochs = 60.0


DATASETS = {"digits": _digits, "folder": _folder}
