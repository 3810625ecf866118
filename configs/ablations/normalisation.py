"""Batch norm: over which images, and how slowly.

    python -m mobilenet_jax.ablate --config configs/ablations/normalisation.py --workdir DIR

Question: do statistics over each device's share of the batch, as `jax.pmap` had them, cost accuracy against those over
the global batch? And what does a decay cost that is meant for runs a hundred times as long?

Paper: none of them compares; their decays go from .9 to .9997. On one device "per_device" is the base itself: give it
several, on CPU by XLA_FLAGS=--xla_force_host_platform_device_count=4. "quarter_batch" has statistics over 32 of the 128
images on any device, by micro-batches. Evaluation uses the running statistics: a decay of .9997 leaves 49% of their
initial values in them after the 2,344 steps on Fashion-MNIST, one of .999 10%.

Found here: not run at length.
"""

from configs import datasets, v2


def get_config(dataset: str = "fashion_mnist"):
    return datasets.shorten(v2.get_config(dataset), dataset)


def sweep() -> dict:
    return {
        "baseline": "global",
        "variants": {
            "global": {},
            "per_device": {"parallel": "pmap"},
            "quarter_batch": {"train.accumulate": 4},
            "decay_0.99": {"model.bn_decay": 0.99},
            "decay_0.999": {"model.bn_decay": 0.999},
            "decay_0.9997": {"model.bn_decay": 0.9997},
        },
        "source": "none compares",
    }
