"""MobileNet in JAX: models, training, exact evaluation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilenet_jax.models.network import create_model

__all__ = ["create_model"]


def __getattr__(name: str):
    # `python -m mobilenet_jax.main --help` imports this file first: JAX waits until a model is asked for.
    if name == "create_model":
        from mobilenet_jax.models.network import create_model

        return create_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
