"""Weights of other frameworks and of our own: downloaded, read, checked, converted and written."""

FORMATS = ("safetensors", "torchvision", "timm")  # that `save_weights` writes; the first is ours


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message is one sentence."""
