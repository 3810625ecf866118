"""The run as a whole, on one device: several are the business of `test_sharding`."""

import importlib
import json
import logging
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import kill_resume
from configs import base
from mobilenet_jax.data.decode import UnreadableImageError
from mobilenet_jax.data.loader import TrainIterator, make_train_iterator
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training import build, loop
from mobilenet_jax.training.config import CARD_KEYS, flatten_config
from mobilenet_jax.training.plan import make_plan, warn_of_slow_statistics
from mobilenet_jax.training.run import NonFiniteError, RefusedError, evaluate_run, prepare, train_and_evaluate
from mobilenet_jax.training.sharding import make_mesh
from mobilenet_jax.training.signals import StopSignals
from mobilenet_jax.weights.card import HALF, Preprocessing, make_card
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir.checkpoint import read_checkpoint
from mobilenet_jax.workdir.metrics import read_metrics

event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # generated: no types
STEPS = 12


def make_config(**values) -> Any:
    """A run of seconds with momentum, averages, dropout and augmentation; dotted keys as `optim__name`."""
    config: Any = base.get_config()
    settings = {
        "model__name": "mobilenet_v1",
        "model__width": 0.1,
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


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(build, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a finished run of `make_config()`."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        train_and_evaluate(make_config(), workdir)
    return workdir


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
    }
    assert json.loads((finished / "environment.json").read_text())["packages"]["jax"] == jax.__version__
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


def test_evaluation_of_a_finished_run_gives_its_numbers_again(finished):
    last = read_metrics(finished)[-1]
    found = evaluate_run(make_config(), finished)
    assert found == {"step": STEPS} | {k: v for k, v in last.items() if k.startswith(("eval/", "eval_ema/"))}


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint to evaluate"):
        evaluate_run(make_config(), tmp_path)


# Stopping and continuing.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_trap_27_a_stopped_run_continues_to_the_same_bits(finished, tmp_path, monkeypatch, number):
    """Stopped between two lines of the log, two evaluations and two saves: the sums of the line go on."""
    before = signal.getsignal(number)  # a shell in the background has SIGINT ignored
    with monkeypatch.context() as patch:
        send_at(patch, 5, number)
        stopped = train_and_evaluate(make_config(), tmp_path)
    assert stopped == {"stopped": number.name, "step": 5}
    assert read_checkpoint(tmp_path)[0]["step"] == 5
    assert not (tmp_path / "result.json").exists()
    assert signal.getsignal(number) is before
    result = train_and_evaluate(make_config(), tmp_path)
    assert result == read_result(finished)
    assert_same_run(finished, tmp_path)


def test_trap_29_resumed_steps_do_not_repeat_the_first_ones_randomness(finished, tmp_path, monkeypatch):
    """Dropout and shuffle of steps 5 to 12 are those of the uninterrupted run, not of steps 1 to 8."""
    with monkeypatch.context() as patch:
        send_at(patch, 4, signal.SIGTERM)
        train_and_evaluate(make_config(), tmp_path)
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


def test_kills_at_random_moments_leave_no_trace(tmp_path, monkeypatch):
    """A short `python benchmarks/kill_resume.py`."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    )
    assert kill_resume.compare(tmp_path, kills=4, steps=40, seed=2) == 0


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
        (6, spoil("grad_norm"), "grad_norm is nan at step 6"),
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


# Lengths and rates.


def test_steps_come_before_epochs_and_may_be_a_share_of_one():
    assert make_plan(make_config(train__steps=None, train__epochs=0.5), 1437).total_steps == math.ceil(1437 / 64)
    assert make_plan(make_config(train__steps=7, train__epochs=100.0), 1437).total_steps == 7


def test_trap_20_an_override_of_the_batch_size_leaves_nothing_stale(tmp_path):
    plans, rates = [], []
    for batch_size in (32, 64):
        config = make_config(data__batch_size=batch_size, train__steps=None, train__epochs=2.0)
        setup = build.build(config, tmp_path / str(batch_size))
        plans.append(setup.plan)
        rates.append(np.asarray(setup.schedule(0)).item())
    assert [plan.total_steps for plan in plans] == [90, 45]
    assert [plan.steps_per_epoch for plan in plans] == [1437 / 32, 1437 / 64]
    assert [(plan.eval_every, plan.save_every) for plan in plans] == [(7, 4), (3, 2)]
    assert rates == pytest.approx([0.4 * 32 / 256, 0.4 * 64 / 256])


@pytest.mark.parametrize(
    ("bn_decay", "steps", "fits"), [(0.9997, 450, False), (0.99, 100, False), (0.9, 450, True), (0.99, 450, True)]
)
def test_trap_17_statistics_too_slow_for_the_run_are_said(caplog, bn_decay, steps, fits):
    warn_of_slow_statistics(bn_decay, steps)
    assert (caplog.text == "") == fits
    if not fits:
        assert f"model.bn_decay = {bn_decay:g}" in caplog.text
        share = float(caplog.text.rpartition(";")[2].split()[0])
        assert share**steps <= 0.011
        caplog.clear()
        warn_of_slow_statistics(share, steps)
        assert caplog.text == ""


def test_trap_17_is_part_of_a_run_with_moving_statistics(tmp_path, caplog):
    slow: dict = {"model__bn_decay": 0.9997, "train__steps": 100}
    for freeze, warned in ((True, False), (False, True)):
        caplog.clear()
        build.build(make_config(**slow, train__freeze_stats=freeze), tmp_path)
        assert ("model.bn_decay = 0.9997" in caplog.text) == warned


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train__steps", 0, "train.steps, or train.epochs"),
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


# What a run starts from.


def test_init_takes_the_averages_of_another_run_and_evaluates_what_is_held_out(finished, tmp_path):
    config = make_config(init=str(finished), data__holdout=0.3)
    with prepare(config, tmp_path) as run:
        source, _ = read_checkpoint(finished)
        for part in ("params", "batch_stats"):
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(run.start.state, part)):
                name = f"ema.{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
                np.testing.assert_array_equal(np.asarray(leaf), source[name])
    info = run.setup.info
    assert run.start.step == 0
    assert info.train_count + info.eval_count == 1437
    assert evaluate_run(config, tmp_path)["eval/count"] == info.eval_count == pytest.approx(0.3 * 1437, abs=10)


def test_init_of_another_width_or_of_nothing_is_refused(finished, tmp_path):
    with pytest.raises(RefusedError, match="does not fit the model"):
        train_and_evaluate(make_config(init=str(finished), model__width=0.25), tmp_path)
    with pytest.raises(RefusedError, match=r"there are no weights .*nothing; valid: a file"):
        train_and_evaluate(make_config(init=str(tmp_path / "nothing")), tmp_path)


def test_init_takes_a_file_of_another_framework_if_its_sums_are_the_models(tmp_path):
    model = create_model("mobilenet_v2", width=0.25, num_classes=10, convention="torchvision")
    variables = init_variables(model, seed=5)
    path = tmp_path / "w.pth"
    card = {"name": "", "model": "mobilenet_v2", "width": 0.25, "convention": "torchvision"}
    card |= {"preprocessing": asdict(HALF), "class_names": None, "source": {}, "metrics": {}, "notes": []}
    save_weights(path, model, variables, card, format="torchvision")
    here = {"model__name": "mobilenet_v2", "model__width": 0.25, "init": str(path)}
    with pytest.raises(
        ValueError, match=r"padding symmetric and bn_epsilon 1e-05, .*set model.convention to torchvision"
    ):
        train_and_evaluate(make_config(**here), tmp_path / "run")
    with prepare(make_config(**here, model__convention="torchvision"), tmp_path / "run") as run:
        for found, expected in zip(
            jax.tree.leaves(run.start.state.params), jax.tree.leaves(variables["params"]), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(found), expected)
    with pytest.raises(ValueError, match="does not fit torchvision/mobilenet_v3_small"):
        train_and_evaluate(make_config(**here, init_name="torchvision/mobilenet_v3_small"), tmp_path / "run")


def test_a_run_is_weights_with_a_card(finished):
    model, variables, card = load_weights(finished, lowering="plain")
    leaves, meta = read_checkpoint(finished)
    for part in ("params", "batch_stats"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables[part]):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            np.testing.assert_array_equal(leaf, leaves[f"ema.{part}.{name}"])
    assert (model.lowering, model.spec.num_classes, model.spec.stem.stride) == ("plain", 10, 1)
    assert (card["name"], card["model"], card["width"]) == ("mobilenet_v2", "mobilenet_v1", 0.1)
    assert card["preprocessing"] == {key: meta["config"][f"data.{key}"] for key in asdict(HALF)}
    assert card["class_names"] == list("0123456789")
    assert card["metrics"]["eval_ema/top1"] == read_result(finished)["top1"]
    # Any checkpoint of the run by its folder, and the whole of it in one file.
    step = max(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert card["source"]["file"] == f"finished, step {step}"
    assert load_weights(finished / "checkpoints" / str(step))[2]["source"]["sha256"] == card["source"]["sha256"]
    save_weights(finished.parent / "w.safetensors", model, variables, card)
    assert load_weights(finished.parent / "w.safetensors", lowering="plain")[0::2] == (model, card)


def test_init_starts_a_classifier_of_other_classes_afresh(finished, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    config = make_config(init=str(finished), data__source="fake:64", data__num_classes=4)
    with prepare(config, tmp_path) as run:
        assert run.start.state.params["classifier"]["kernel"].shape[-1] == 4
    assert "classifier starts afresh" in caplog.text


def test_frozen_parts_stay_as_they_were(tmp_path):
    config = make_config(optim__freeze=("^stem/", "^block_"), train__steps=2, optim__l2=0.1)
    with prepare(config, tmp_path) as run:
        before = jax.tree.map(np.array, run.start.state.params)
    train_and_evaluate(config, tmp_path)
    after, _ = read_checkpoint(tmp_path)
    for name, part in before.items():
        same = [
            np.array_equal(leaf, after[f"params.{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}"])
            for path, leaf in jax.tree_util.tree_leaves_with_path(part)
        ]
        assert all(same) == name.startswith(("stem", "block_")), name


# Transfer.

NOT_CLASSIFIER = ("^(?!classifier/)",)
PHASES: dict = {
    "optim__freeze": NOT_CLASSIFIER,
    "optim__freeze_epochs": 0.1,  # 4 steps
    "optim__layer_decay": 0.8,
    "optim__name": "adamw",
    "optim__lr_per_256": 0.04,
    "train__recompute_stats_epochs": 0.06,  # 3 batches
}


def make_probe_config(**values) -> Any:
    cached: dict = {"train__cache_features": True, "train__freeze_stats": True, "optim__freeze": NOT_CLASSIFIER}
    return make_config(**{**cached, "data__crop": "resize", **values})


@pytest.fixture(scope="module")
def phases(tmp_path_factory) -> Path:
    """The workdir of a finished run whose layers thaw after 4 of 12 steps."""
    workdir = tmp_path_factory.mktemp("run") / "phases"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        train_and_evaluate(make_config(**PHASES), workdir)
    return workdir


def stop_after(monkeypatch, workdir: Path, step: int, config) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint of a run that a signal stopped."""
    with monkeypatch.context() as patch:
        send_at(patch, step, signal.SIGTERM)
        assert train_and_evaluate(config, workdir)["step"] == step
    return read_checkpoint(workdir)[0]


def test_all_but_the_classifier_stay_to_the_bit_and_then_all_move(phases, tmp_path, monkeypatch):
    config = make_config(**PHASES)
    fresh = init_variables(build.build_model(config, build.describe(config.data)), seed=0)
    start = {
        f"{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for part in ("params", "batch_stats")
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh[part])
    }
    leaves = stop_after(monkeypatch, tmp_path, 4, config)
    same = {name: np.array_equal(leaves[name], value) for name, value in start.items()}
    assert {name for name in same if not same[name]} == {"params.classifier.kernel", "params.classifier.bias"}
    leaves, _ = read_checkpoint(phases)
    assert not any(np.array_equal(leaves[name], value) for name, value in start.items())


@pytest.mark.parametrize("step", [4, 6])
def test_trap_27_phases_continue_to_the_same_bits_from_either_side(phases, tmp_path, monkeypatch, step):
    stop_after(monkeypatch, tmp_path, step, make_config(**PHASES))
    assert train_and_evaluate(make_config(**PHASES), tmp_path) == read_result(phases)
    assert_same_run(phases, tmp_path)


def test_trap_17_the_run_ends_with_statistics_of_its_last_parameters(phases):
    """Of the averages as well: those of three batches of the training stream, here by NumPy for the stem."""
    config = make_config(**PHASES)
    stream = make_train_iterator(config.data, seed=config.seed, process_index=0, process_count=1)
    images = np.concatenate([next(stream)["images"] for _ in range(3)])
    stream.close()
    leaves, meta = read_checkpoint(phases)
    assert meta["iterator"]["next_batch"] == STEPS  # the stream that training would continue
    inputs = jnp.asarray((images.astype(np.float32) - 127.5) / 127.5)
    for kind in ("", "ema."):
        maps = jax.lax.conv_general_dilated(
            inputs,
            jnp.asarray(leaves[f"{kind}params.stem.conv.kernel"]),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        maps = np.asarray(maps, np.float64)
        found = {leaf: leaves[f"{kind}batch_stats.stem.norm.{leaf}"] for leaf in ("mean", "var")}
        np.testing.assert_allclose(found["mean"], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["var"], maps.var((0, 1, 2)), rtol=1e-4)


@pytest.fixture(scope="module")
def probe(finished, tmp_path_factory) -> Path:
    """The workdir of a finished linear probe of `finished` on other digits than it was trained on."""
    workdir = tmp_path_factory.mktemp("run") / "probe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        train_and_evaluate(make_probe_config(init=str(finished)), workdir)
    return workdir


def test_a_probe_evaluates_on_features_as_the_whole_network_does_on_images(finished, probe):
    last = read_metrics(probe)[-1]
    found = evaluate_run(make_probe_config(init=str(finished)), probe)
    for name in ("eval", "eval_ema"):
        assert found[f"{name}/top1"] == last[f"{name}/top1"]
        assert found[f"{name}/loss"] == pytest.approx(last[f"{name}/loss"], rel=1e-5)
    leaves, source = (read_checkpoint(workdir)[0] for workdir in (probe, finished))
    changed = {
        name
        for name, leaf in leaves.items()
        if name.startswith(("params.", "batch_stats.")) and not np.array_equal(leaf, source[f"ema.{name}"])
    }
    assert changed == {"params.classifier.kernel", "params.classifier.bias"}
    width = leaves["params.classifier.kernel"].shape[0]
    assert read_result(probe)["trained"] == width * 10 + 10


def test_trap_27_a_probe_continues_to_the_same_bits(finished, probe, tmp_path, monkeypatch):
    config = make_probe_config(init=str(finished))
    stop_after(monkeypatch, tmp_path, 5, config)
    assert train_and_evaluate(config, tmp_path) == read_result(probe)
    assert_same_run(probe, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__flip", True, r"train\.cache_features sees each image once, .*; data\.flip is True; valid"),
        ("data__crop", "pad", r"data\.crop is 'pad'; valid: data\.crop='resize'"),
        ("train__recompute_stats_epochs", 1.0, r"train\.recompute_stats_epochs is not 0"),
        ("optim__freeze_epochs", 1.0, r"optim\.freeze_epochs is 1\.0"),
        ("optim__freeze", ("^stem/",), r"trains the classifier alone; set optim\.freeze to"),
        ("optim__freeze", (), r"trains the classifier alone"),
    ],
)
def test_a_probe_of_what_changes_is_refused(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(make_probe_config(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def make_card_file(path: Path) -> Path:
    """Weights of five classes whose card has a preprocessing of its own."""
    model = create_model("mobilenet_v3_small", width=0.35, num_classes=5, convention="torchvision")
    card = make_card(
        name="mine",
        model="mobilenet_v3_small",
        width=0.35,
        convention="torchvision",
        spec=model.spec,
        preprocessing=Preprocessing((100.0, 110.0, 120.0), (50.0, 60.0, 70.0), 40, 0.9, "bicubic"),
        class_names=None,
        source={},
    )
    save_weights(path, model, init_variables(model, seed=1), card)
    return path


FROM_CARD: dict = {key.replace(".", "__"): None for key in CARD_KEYS}


def test_trap_24_network_and_preprocessing_are_those_of_the_weights_unless_set(tmp_path, caplog):
    weights = make_card_file(tmp_path / "w.safetensors")
    config = make_config(**{**FROM_CARD, "model__stride_one": (), "init": str(weights), "data__crop_share": 0.8})
    with prepare(config, tmp_path / "run") as run:
        data, saved = run.setup.config.data, run.setup.flat_config
        assert (data.image_size, data.crop_share, data.interpolation) == (40, 0.8, "bicubic")
        assert (tuple(data.mean), tuple(data.std)) == ((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
        assert (
            run.setup.model.spec
            == create_model(
                "mobilenet_v3_small", width=0.35, num_classes=10, convention="torchvision", dropout=0.2, bn_decay=0.9
            ).spec
        )
        assert None not in [saved[key] for key in CARD_KEYS]
        assert run.start.state.params["classifier"]["kernel"].shape[-1] == 10
    assert "was trained with other preprocessing: data.crop_share is 0.8, there 0.9" in caplog.text
    assert config.data.image_size is None  # the caller's config is as it was


def test_a_config_that_follows_weights_needs_some(tmp_path):
    with pytest.raises(ValueError, match=r"model\.name, .* are none: as the weights have them; set init") as error:
        train_and_evaluate(make_config(**FROM_CARD), tmp_path / "run")
    assert "\n" not in str(error.value)


# Images that cannot be read.


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 + 4 images in two classes, one of the 20 damaged."""
    generator = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "train" / "a" / "3.png").write_bytes(b"no image")
    return root


def make_folder_config(folder: Path, **values) -> Any:
    return make_config(
        data__source="folder", data__path=str(folder), data__batch_size=8, data__eval_batch_size=4, **values
    )


def test_an_unreadable_training_image_stops_the_run_by_name(folder, tmp_path):
    with pytest.raises(UnreadableImageError, match=r"train/a/3\.png cannot be decoded") as error:
        train_and_evaluate(make_folder_config(folder), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_skipped_images_are_counted_and_the_count_survives_a_stop(folder, tmp_path, monkeypatch):
    values: dict = {"data__on_error": "skip", "train__steps": 9, "train__log_every_steps": 1}
    config = make_folder_config(folder, **values, train__save_every_epochs=0.0, train__eval_every_epochs=0.0)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train_and_evaluate(config, whole)
    # 72 examples: three epochs of 20 images and 12 of the fourth.
    counts = [line["data/skipped"] for line in read_metrics(whole)]
    assert result["skipped"] == counts[-1]
    assert 3 <= counts[-1] <= 4
    assert counts == sorted(counts)
    # Stopped just before a step that skips: what was read ahead is not counted.
    at = next(i for i, count in enumerate(counts) if count > counts[0]) or 1
    with monkeypatch.context() as patch:
        send_at(patch, at, signal.SIGTERM)
        assert train_and_evaluate(config, stopped)["step"] == at
    assert train_and_evaluate(config, stopped) == result
    assert [line["data/skipped"] for line in read_metrics(stopped)] == counts


def test_evaluation_never_skips(folder, tmp_path):
    (folder / "train" / "a" / "3.png").unlink()
    (folder / "test" / "b" / "1.png").write_bytes(b"no image")
    config = make_folder_config(folder, data__on_error="skip", train__steps=1)
    with pytest.raises(UnreadableImageError, match=r"test/b/1\.png cannot be decoded"):
        train_and_evaluate(config, tmp_path / "run")
