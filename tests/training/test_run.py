"""A run as a whole: its files, stopping and continuing, and steps that go wrong."""

import importlib
import json
import os
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from runs import STEPS, assert_same_run, make_config, read_result, send_at

from benchmarks import kill_resume
from mobilenet_jax.data.loader import TrainIterator, make_train_iterator
from mobilenet_jax.training import loop
from mobilenet_jax.training.build import build
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.result import read_result as read_saved_result
from mobilenet_jax.training.run import NonFiniteError, evaluate_run, prepare, train_and_evaluate
from mobilenet_jax.training.signals import StopSignals
from mobilenet_jax.workdir.checkpoint import TEACHER_KEY, read_checkpoint
from mobilenet_jax.workdir.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # generated: no types


# A run to its end.


def test_metrics_have_the_documented_keys(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == [3, 6, 7, 9, 12]
    always = {"step", "epoch", "train/loss", "train/top1", "train/lr", "train/grad_norm", "data/skipped"}
    always |= {"time/images_per_second", "time/data_wait"}
    of_evaluation = {
        f"{kind}/{name}" for kind in ("eval", "eval_ema") for name in ("loss", "top1", "top5", "ece", "count")
    }
    for line in lines:
        assert line.keys() == always | (of_evaluation if line["step"] in (7, 12) else set())
        assert line["epoch"] == pytest.approx(line["step"] * 32 / 1437)
        assert line["train/lr"] == pytest.approx(0.4 * 32 / 256)
        assert 0 <= line["time/data_wait"] <= 1
    assert {line["eval/count"] for line in lines if "eval/count" in line} == {360}


def test_event_files_hold_the_same_numbers(finished):
    data = b"".join(path.read_bytes() for path in sorted(finished.glob("events.*")))
    found, start = {}, 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 8], "little")
        event = event_pb2.Event.FromString(data[start + 12 : start + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        start += size + 16
    for line in read_metrics(finished):
        for name in line.keys() - {"step"}:
            assert found[name, line["step"]] == np.float32(line[name]), (name, line["step"])


def test_files_of_a_finished_run(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config == {
        **flatten_config(make_config()),
        "model.num_classes": 10,
        "data.train_images": 1437,
        "processes": 1,
        TEACHER_KEY: None,
    }
    assert json.loads((finished / "environment.json").read_text())["packages"]["jax"] == jax.__version__
    startup = json.loads((finished / "startup.json").read_text())
    assert list(startup) == ["data", "init", "trace", "compile"]
    assert all(seconds >= 0 for seconds in startup.values())
    confusion = np.loadtxt(finished / "confusion.csv", delimiter=",", dtype=int)
    result = read_result(finished)
    assert confusion.shape == (10, 10)
    assert confusion.sum() == 360
    assert np.trace(confusion) / 360 == result["top1"]
    for name in ("curves.png", "confusion.png"):
        with Image.open(finished / name) as image:
            image.verify()
    assert sorted(int(path.name) for path in (finished / "checkpoints").iterdir()) == [8, 12]


def test_result_is_that_of_the_last_step_and_of_the_averages(finished):
    last = read_metrics(finished)[-1]
    leaves, _ = read_checkpoint(finished)
    assert read_result(finished) == {
        "step": STEPS,
        "epoch": last["epoch"],
        "variables": "averaged",
        **{name: last[f"eval_ema/{name}"] for name in ("loss", "top1", "top5", "count")},
        "params": sum(leaf.size for name, leaf in leaves.items() if name.startswith("params.")),
        "trained": sum(leaf.size for name, leaf in leaves.items() if name.startswith("params.")),
        "skipped": 0,
    }


def test_a_better_evaluation_before_the_last_is_not_the_result(tmp_path, monkeypatch):
    original, tops = loop.make_evaluator, iter([0.99, 0.5])

    def make_evaluator(task, mesh):
        evaluate = original(task, mesh)

        def with_top1(state):
            found = evaluate(state)
            return found._replace(metrics=found.metrics | {"eval/top1": next(tops)})

        return with_top1

    monkeypatch.setattr(loop, "make_evaluator", make_evaluator)
    result = train_and_evaluate(make_config(ema__decay=0.0, train__steps=8), tmp_path)
    assert (result["variables"], result["top1"]) == ("last", 0.5)


def test_finished_run_gives_its_result_and_trains_nothing(finished, monkeypatch):
    monkeypatch.setattr(TrainIterator, "__next__", lambda self: pytest.fail("a finished run trains"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert train_and_evaluate(make_config(), finished) == read_result(finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ['{"step": 12, "top', "", "[]", "\0\0\0"])
def test_a_torn_result_counts_as_missing(tmp_path, caplog, content):
    setup = build(make_config(), tmp_path)
    (tmp_path / "result.json").write_text(content)
    assert read_saved_result(setup, STEPS) is None
    assert "result.json is damaged" in caplog.text


def test_evaluation_of_a_finished_run_gives_its_numbers_again(finished):
    last = read_metrics(finished)[-1]
    found = evaluate_run(make_config(), finished)
    assert found == {"step": STEPS} | {k: v for k, v in last.items() if k.startswith(("eval/", "eval_ema/"))}


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint to evaluate"):
        evaluate_run(make_config(), tmp_path)


# Stopping and continuing.


def test_trap_27_a_stopped_run_continues_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Stopped between two lines of the log, two evaluations and two saves: the sums of the line go on."""
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_at(patch, 5, signal.SIGTERM)
        stopped = train_and_evaluate(make_config(), tmp_path)
    assert stopped == {"stopped": "SIGTERM", "step": 5}
    assert read_checkpoint(tmp_path)[0]["step"] == 5
    assert not (tmp_path / "result.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    result = train_and_evaluate(make_config(), tmp_path)
    assert result == read_result(finished)
    assert_same_run(finished, tmp_path)


def test_trap_29_resumed_steps_do_not_repeat_the_first_ones_randomness(tmp_path, monkeypatch):
    """Dropout and shuffle of steps 5 to 12 are those of the uninterrupted run, not of steps 1 to 8."""
    before = signal.getsignal(signal.SIGINT)  # a shell in the background has SIGINT ignored
    with monkeypatch.context() as patch:
        send_at(patch, 4, signal.SIGINT)
        assert train_and_evaluate(make_config(), tmp_path) == {"stopped": "SIGINT", "step": 4}
    assert signal.getsignal(signal.SIGINT) is before
    with prepare(make_config(), tmp_path) as run:
        batch = next(run.images.iterator)
    config = make_config()
    stream = make_train_iterator(config.data, seed=config.seed, process_index=0, process_count=1)
    batches = [next(stream) for _ in range(5)]
    stream.close()
    np.testing.assert_array_equal(batch["images"], batches[4]["images"])
    assert not np.array_equal(batch["images"], batches[0]["images"])


def test_second_signal_interrupts_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_finished_run_made_longer_does_not_give_its_old_result(finished, tmp_path):
    """Also where it was killed between the last save and the result."""
    workdir = tmp_path / "longer"
    shutil.copytree(finished, workdir)
    longer = train_and_evaluate(make_config(train__steps=STEPS + 2), workdir)
    assert (longer["step"], read_result(finished)["step"]) == (STEPS + 2, STEPS)
    shutil.copy(finished / "result.json", workdir)
    assert train_and_evaluate(make_config(train__steps=STEPS + 2), workdir) == longer
    assert read_result(workdir) == longer


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(tmp_path, monkeypatch):
    """A short `python benchmarks/kill_resume.py`: this seed draws a kill of each kind."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    )
    assert kill_resume.compare(tmp_path, kills=2, steps=20, seed=13, flags=[]) == 0


# Steps that go wrong.


def break_step(monkeypatch, bad_step: int, change) -> None:
    """Have `change(state, sums)` come out of the compiled step `bad_step`."""
    original = loop.compile_step

    def compile_step(*arguments, **phase):
        compiled, seconds = original(*arguments, **phase)

        def step(state, batch, key):
            done = int(state.step) + 1
            state, sums = compiled(state, batch, key)
            return change(state, sums) if done == bad_step else (state, sums)

        return step, seconds

    monkeypatch.setattr(loop, "compile_step", compile_step)


def spoil(name: str):
    return lambda state, sums: (state, sums | {name: (np.float32("nan"), np.float32(1))})


def spoil_params(state, sums):
    params = jax.tree.map(lambda leaf: leaf * np.inf, state.params)
    return state.replace(params=params), sums


@pytest.mark.parametrize(
    ("bad_step", "change", "what"),
    [
        (6, spoil("loss"), "loss is nan at step 6"),
        # The step of a save: it must wait for its own loss, and look at what it saves.
        (8, spoil("grad_norm"), "grad_norm is nan at step 8"),
        (8, spoil_params, r"params\..* is not finite at step 8"),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch, bad_step, change, what):
    break_step(monkeypatch, bad_step, change)
    with pytest.raises(NonFiniteError, match=what + r", learning rate 0.05; the checkpoints .* are kept"):
        train_and_evaluate(make_config(), tmp_path)
    leaves, _ = read_checkpoint(tmp_path)
    assert leaves["step"] == 4
    assert all(np.isfinite(leaf).all() for leaf in leaves.values())


def test_a_huge_learning_rate_is_caught(tmp_path):
    with pytest.raises(NonFiniteError, match=r"at step \d+, learning rate 1.25e\+36; .* lower optim.lr_per_256"):
        train_and_evaluate(make_config(optim__lr_per_256=1e37), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train__steps", 0, "train.steps is 0; valid: 1 or more"),
        ("train__log_every_steps", 0, "train.log_every_steps is 0; valid: 1 or more"),
        ("train__save_every_epochs", -1.0, "train.save_every_epochs is -1"),
        ("train__recompute_stats_epochs", -1.0, "train.recompute_stats_epochs is -1"),
        ("train__accumulate", 3, "data.batch_size / train.accumulate"),
        ("data__mixup", -0.1, "data.mixup is -0.1"),
        ("data__mix_probability", 1.5, "data.mix_probability is 1.5"),
        ("model__dtype", "float64", "model.dtype is 'float64'; valid: float32, bfloat16"),
        ("data__std", (1.0, 0.0, 1.0), "data.std"),
        ("data__crop", "middle", "data.crop"),
        ("seed", -1, "seed is -1; valid: 0 or more"),
        ("parallel", "pjit", "pmap"),
        ("ema__decay", 1.0, "ema.decay"),
        ("model__num_classes", 3, "model.num_classes is 3; digits has 10 classes"),
        ("model__stride_one", (), "data.image_size is 16: a map of 1x1 is too small"),
        ("model__name", "mobilenet_v9", "mobilenet_v3_small"),
        ("optim__name", "lion", "adamw"),
        ("optim__freeze", ("nothing",), "optim.freeze: 'nothing' matches no parameter"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_written(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        train_and_evaluate(make_config(**{key: value}), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
