import sys

import pytest

from benchmarks.speed import startup
from benchmarks.speed.startup import measure_startup, time_first_step
from benchmarks.speed.turns import WorkerError


def test_second_start_finds_what_the_first_compiled():
    tiny = {"model.name": "mobilenet_v1", "model.width": 0.1, "data.image_size": 16, "data.batch_size": 8}
    tiny["model.lowering"] = "plain"  # compiles soonest
    result = measure_startup(tiny, rounds=1)
    cold, warm = (result[kind]["split"][0] for kind in ("cold", "warm"))
    assert list(cold) == ["import", "data", "init", "trace", "compile"]
    assert warm["compile"] < cold["compile"]
    for kind, split in (("cold", cold), ("warm", warm)):
        # The interpreter's own start is not in the split, which is rounded to tenths.
        assert result[kind]["seconds"][0] > sum(split.values()) - 0.05 * len(split)


def test_time_is_that_of_the_line_and_the_process_does_not_live_on():
    says = "first step after 3.0 s: import 2.5, compile 0.5"
    command = [sys.executable, "-c", f"import sys, time; print({says!r}, file=sys.stderr, flush=True); time.sleep(60)"]
    seconds, split = time_first_step(command)
    assert 0 < seconds < 10
    assert split == {"import": 2.5, "compile": 0.5}


def test_main_that_ends_before_is_one_sentence():
    command = [sys.executable, "-m", "mobilenet_jax.main", "--config=configs/v9.py"]
    with pytest.raises(WorkerError) as error:
        time_first_step(command)
    start = "main ended with exit code 2 before its first step: configs/v9.py is not a file; valid: "
    assert str(error.value).startswith(start)


def test_without_a_checkout_there_is_nothing_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"v2\.py is not there: start-up is measured in a checkout"):
        measure_startup({}, rounds=1)
