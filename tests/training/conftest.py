"""Whole runs on one device."""

from pathlib import Path

import pytest
from runs import make_config, on_one_device

from mobilenet_jax.training.run import train_and_evaluate


@pytest.fixture
def one_device():
    """Runs of the test see one device: several are the business of `test_sharding`."""
    with on_one_device():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The workdir of a finished run of `make_config()`."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    with on_one_device():
        train_and_evaluate(make_config(), workdir)
    return workdir
