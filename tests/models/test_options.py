"""The options have the names of the config."""

import inspect
from typing import Any

from configs import base
from mobilenet_jax.models.network import create_model
from mobilenet_jax.models.options import OPTIONS


def test_config_and_options_have_the_same_names():
    config: Any = base.get_config()
    keys = set(config.model)
    arguments = inspect.signature(create_model).parameters.values()
    named = {parameter.name for parameter in arguments if parameter.kind is not parameter.VAR_KEYWORD}
    assert set(OPTIONS) <= keys
    assert keys <= set(OPTIONS) | named
    assert not set(OPTIONS) & named
