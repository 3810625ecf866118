"""A run of seconds, for the tests of whole runs."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from benchmarks import kill_resume
from configs import base
from mobilenet_jax.data.loader import TrainIterator

STEPS = 12


def make_config(**values) -> Any:
    """A run of seconds with momentum, averages, dropout and augmentation; dotted keys as `optim__name`."""
    config: Any = base.get_config()
    settings = {
        "model__name": "mobilenet_v1",
        "model__width": 0.1,
        "model__shallow": True,
        "model__stride_one": (0,),
        "data__image_size": 16,
        "data__batch_size": 32,
        "data__crop": "pad",
        "train__steps": STEPS,
        "train__log_every_steps": 3,
        "train__eval_every_epochs": 0.15,  # 7 of the 44.9 steps of an epoch
        "train__save_every_epochs": 0.09,  # 4
        "optim__schedule": "constant",
        "optim__lr_per_256": 0.4,
        "ema__decay": 0.9,
        **values,
    }
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return config


def read_result(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def send_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Have a signal come while `step` is being computed."""
    original = TrainIterator.__next__

    def next_batch(self):
        if self.get_state()["next_batch"] == step - 1:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(TrainIterator, "__next__", next_batch)


def assert_same_run(first: Path, second: Path) -> None:
    """All that must be equal to the last bit is."""
    assert kill_resume.find_differences(kill_resume.read_run(first), kill_resume.read_run(second)) == []
