"""A run that an older version of this code began continues as that version would have continued it.

`begun_before/` is the workdir at step 4. `expected.json` says what the older version had there and did next.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from mobilenet_jax.data.loader import make_train_iterator
from mobilenet_jax.training.run import train_and_evaluate
from mobilenet_jax.workdir.checkpoint import read_checkpoint
from mobilenet_jax.workdir.metrics import read_metrics

WORKDIR = Path(__file__).parent / "begun_before"
EXPECTED = json.loads((WORKDIR / "expected.json").read_text())


def make_config() -> Any:
    config: Any = base.get_config()
    config.update_from_flattened_dict(
        {
            "name": "begun_before",
            "model.name": "mobilenet_v1",
            "model.width": 0.1,
            "model.shallow": True,
            "model.bn_epsilon": 0.1,  # with a small one and a large rate, rounding grows to percents in ten steps
            "model.stride_one": (0,),
            "data.image_size": 16,
            "data.batch_size": 32,
            "data.crop": "pad",
            "train.steps": 12,
            "train.log_every_steps": 3,
            "train.eval_every_epochs": 0.15,
            "train.save_every_epochs": 0.09,
            "train.keep_checkpoints": 10,
            "optim.schedule": "constant",
            "optim.lr_per_256": 0.04,
            "ema.decay": 0.9,
        }
    )
    return config


def checksum(leaves: dict[str, np.ndarray]) -> int:
    """The CRC-32 of all arrays in the order of their names."""
    value = 0
    for name in sorted(leaves):
        value = zlib.crc32(leaves[name].tobytes(), value)
    return value


def test_the_state_and_the_data_are_those_of_the_older_version():
    leaves, meta = read_checkpoint(WORKDIR)
    assert checksum(leaves) == meta["checksum"] == EXPECTED["state_4"]
    config = make_config()
    iterator = make_train_iterator(config.data, seed=config.seed, process_index=0, process_count=1)
    iterator.set_state(meta["iterator"])
    batch = next(iterator)
    iterator.close()
    assert {name: zlib.crc32(batch[name].tobytes()) for name in ("images", "labels")} == EXPECTED["batch_5"]


@pytest.mark.slow
def test_the_run_continues_with_the_same_numbers(tmp_path, monkeypatch, optimized):
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [device])  # the older run had one: sums over eight round otherwise
    workdir = tmp_path / "run"
    shutil.copytree(WORKDIR, workdir)
    train_and_evaluate(make_config(), workdir)
    lines = [
        {name: value for name, value in line.items() if not name.startswith("time/")} for line in read_metrics(workdir)
    ]
    assert lines[0]["step"] == 3
    # The last digits depend on the processor. On the one that the older version ran on, all are equal, and so is the
    # state of step 12: its checksum is in `expected.json`.
    assert lines[1:] == [pytest.approx(line, rel=1e-4) for line in EXPECTED["metrics"]]
