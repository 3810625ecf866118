"""Runs with frozen parts: two phases, and a probe on features computed once."""

import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import STEPS, assert_same_run, make_config, read_result, send_at

from mobilenet_jax.data.loader import make_train_iterator
from mobilenet_jax.data.sources import describe
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.training import build
from mobilenet_jax.training.run import evaluate_run, train_and_evaluate
from mobilenet_jax.workdir.checkpoint import read_checkpoint
from mobilenet_jax.workdir.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


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
def phases(tmp_path_factory, show_one_device) -> Path:
    """The workdir of a finished run whose layers thaw after 4 of 12 steps."""
    workdir = tmp_path_factory.mktemp("run") / "phases"
    with show_one_device():
        train_and_evaluate(make_config(**PHASES), workdir)
    return workdir


def stop_after(monkeypatch, workdir: Path, step: int, config) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint of a run that a signal stopped."""
    with monkeypatch.context() as patch:
        send_at(patch, step, signal.SIGTERM)
        assert train_and_evaluate(config, workdir)["step"] == step
    return read_checkpoint(workdir)[0]


def list_fresh(config) -> dict[str, np.ndarray]:
    """The parameters and statistics that a run of `config` starts from, by their names in a checkpoint."""
    fresh = init_variables(build.build_model(config, describe(config.data)), seed=0)
    return {
        f"{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for part in ("params", "batch_stats")
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh[part])
    }


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_trap_27_phases_continue_to_the_same_bits_from_either_side(phases, tmp_path, monkeypatch, step):
    """At step 4 all but the classifier are still those of the start, to the bit; at the end none is."""
    config = make_config(**PHASES)
    start, stopped = list_fresh(config), stop_after(monkeypatch, tmp_path, step, config)
    changed = {name for name, value in start.items() if not np.array_equal(stopped[name], value)}
    if step == 4:
        assert changed == {"params.classifier.kernel", "params.classifier.bias"}
    assert train_and_evaluate(make_config(**PHASES), tmp_path) == read_result(phases)
    assert_same_run(phases, tmp_path)
    leaves, _ = read_checkpoint(tmp_path)
    assert not any(np.array_equal(leaves[name], value) for name, value in start.items())


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
def probe(finished, tmp_path_factory, show_one_device) -> Path:
    """The workdir of a finished linear probe of `finished` on other digits than it was trained on."""
    workdir = tmp_path_factory.mktemp("run") / "probe"
    with show_one_device():
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
        ("train__distill__weights", "w.pth", r"train\.distill\.weights is not empty; valid: .* or ''"),
        ("optim__freeze", ("^stem/",), r"trains the classifier alone; set optim\.freeze to"),
        ("optim__freeze", (), r"trains the classifier alone"),
    ],
)
def test_a_probe_of_what_changes_is_refused(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(make_probe_config(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
