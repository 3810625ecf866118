"""Weights of other frameworks and of our own: read, checked, converted, written, fetched."""


class WeightsError(ValueError):
    """A file of weights that cannot be used, in one sentence."""
