"""Batch norm: the images that statistics are taken over, and the decay of the running statistics.

    python -m mobilenet_jax.ablate --config configs/ablations/normalisation.py --workdir DIR

Question: do statistics over the batch of each device, as with `jax.pmap`, cost accuracy compared with statistics over
the global batch? And what does a decay cost that is meant for runs a hundred times as long?

Paper: no paper compares them; their decays range from .9 to .9997.

On one device, "per_device" equals the base. It needs several devices; on CPU,
XLA_FLAGS=--xla_force_host_platform_device_count=4 gives four. "quarter_batch" uses micro-batches, so its statistics are
over 32 of the 128 images on any number of devices. Evaluation uses the running statistics. After the 2,344 steps on
Fashion-MNIST, a decay of .9997 leaves 49% of their initial values, a decay of .999 leaves 10%.

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
