"""MobileNet in JAX: models, training, exact evaluation."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilenet_jax.exporting.export import export_weights
    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.models.network import create_model
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.weights.save import save_weights

__version__ = "0.1.0"  # pyproject.toml reads it here
__all__ = ["__version__", "create_model", "export_weights", "init_variables", "load_weights", "save_weights"]

_MODULES = {
    "create_model": "mobilenet_jax.models.network",
    "export_weights": "mobilenet_jax.exporting.export",
    "init_variables": "mobilenet_jax.models.init",
    "load_weights": "mobilenet_jax.weights.load",
    "save_weights": "mobilenet_jax.weights.save",
}


def __getattr__(name: str):
    # `python -m mobilenet_jax.main --help` imports this file first: JAX waits until a model is asked for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
