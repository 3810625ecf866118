"""Whole runs on one device."""

from pathlib import Path

import pytest
from runs import make_config

from mobilenet_jax.training.run import train_and_evaluate


@pytest.fixture(autouse=True)
def _without_figures(no_figures) -> None:
    """No test draws, but runs of fixtures that tests share do: pytest makes those fixtures before this one."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory, show_one_device) -> Path:
    """The workdir of a finished run of `make_config()`."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    with show_one_device():
        train_and_evaluate(make_config(), workdir)
    return workdir
