"""The options, their names in the config, and their errors."""

import inspect

from configs import base
from mobilenet_jax.models.network import create_model
from mobilenet_jax.models.options import OPTIONS


def test_config_and_options_have_the_same_names():
    keys = set(base.get_config().model)
    arguments = inspect.signature(create_model).parameters.values()
    named = {parameter.name for parameter in arguments if parameter.kind is not parameter.VAR_KEYWORD}
    assert set(OPTIONS) <= keys
    assert keys <= set(OPTIONS) | named
    assert not set(OPTIONS) & named
