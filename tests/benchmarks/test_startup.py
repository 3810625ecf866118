import sys

import pytest

from benchmarks.speed import startup
from benchmarks.speed.startup import measure_startup, time_first_step
from benchmarks.speed.turns import WorkerError

TINY = {
    "model.name": "mobilenet_v1",
    "model.width": 0.1,
    "model.lowering": "plain",  # compiles fastest
    "data.image_size": 16,
    "data.batch_size": 8,
    "train.steps": 1,
}


@pytest.mark.slow
def test_second_start_finds_what_the_first_compiled():
    result = measure_startup(TINY, rounds=1)
    cold, warm = (result[kind]["split"][0] for kind in ("cold", "warm"))
    assert list(cold) == ["import", "data", "init", "trace", "compile"]
    assert warm["compile"] < cold["compile"]
    for kind, split in (("cold", cold), ("warm", warm)):
        # The split leaves out the start of the interpreter, and may be rounded to tenths.
        assert result[kind]["seconds"][0] > sum(split.values()) - 0.05 * len(split)


def write_main(folder, text: str) -> list[str]:
    """The command of a program that writes `text` into startup.json and then sleeps."""
    code = f"""
import pathlib, time
file = pathlib.Path({str(folder)!r}, "startup")
file.write_text({text!r})
file.rename(file.with_suffix(".json"))
time.sleep(60)
"""
    return [sys.executable, "-c", code]


def test_time_ends_when_the_file_is_there_and_the_process_does_not_live_on(tmp_path):
    seconds, split = time_first_step(write_main(tmp_path, '{"import": 2.5, "compile": 0.5}'), tmp_path)
    assert 0 < seconds < 10
    assert split == {"import": 2.5, "compile": 0.5}


def test_main_that_ends_before_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "mobilenet_jax.main", "--config=configs/v9.py"]
    with pytest.raises(WorkerError) as error:
        time_first_step(command, tmp_path)
    start = "main ended with exit code 2 before its first step: configs/v9.py is not a file; valid: "
    assert str(error.value).startswith(start)


def test_without_a_checkout_there_is_nothing_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"v2\.py is not there: start-up is measured in a checkout"):
        measure_startup({}, rounds=1)
