import dataclasses
import errno
import json
import logging
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.experimental import multihost_utils

from configs import base
from mobilenet_jax.data.loader import TrainIterator, make_train_iterator
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.steps import TrainState, create_state
from mobilenet_jax.workdir import checkpoint, reading
from mobilenet_jax.workdir.checkpoint import (
    CheckpointMismatchError,
    Checkpoints,
    check_same_run,
    load_variables,
    merge_variables,
    read_checkpoint,
    read_state,
)
from mobilenet_jax.workdir.later_keys import LATER_KEYS

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def make_iterator() -> TrainIterator:
    config: Any = base.get_config()
    config.data.batch_size = 8
    return make_train_iterator(config.data, seed=3, process_index=0, process_count=1)


@pytest.fixture
def iterator():
    iterator = make_iterator()
    yield iterator
    iterator.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with an intact checkpoint of step 1, for tests that only read it."""
    workdir, iterator = tmp_path_factory.mktemp("saved"), make_iterator()
    save(workdir, make_state(1), iterator)
    iterator.close()
    return workdir


def flat_config(**values) -> dict:
    return {**flatten_config(base.get_config()), "data.train_images": 1437, "processes": 1, **values}


def make_variables(*, width: int = 4, classes: int = 10, value: float = 0.0) -> dict:
    params = {
        "stem": {"conv": {"kernel": np.full((3, 3, 3, width), value, np.float32)}},
        "classifier": {"kernel": np.full((width, classes), value, np.float32)},
    }
    return {
        "params": params,
        "batch_stats": {"stem": {"norm": {"mean": np.full((width,), value, np.float32)}}},
    }


def make_state(step: int, *, ema: bool = True, **shape) -> TrainState:
    """Random values in every leaf, -0, the smallest subnormal and the largest number among them."""
    generator = np.random.default_rng(step)
    state = create_state(make_variables(**shape), OPTIMIZER, ema=ema)

    def fill(leaf):
        values = generator.standard_normal(leaf.shape).astype(np.float32)
        values.flat[:3] = -0.0, 1e-45, 3.4e38
        return jnp.asarray(values)

    filled = jax.tree.map(fill, dataclasses.replace(state, step=jnp.zeros(3)))
    return dataclasses.replace(filled, step=jnp.int32(step))


def save(workdir: Path, state: TrainState, iterator: TrainIterator, *, keep: int = 2, **config) -> None:
    checkpoints = Checkpoints(workdir, keep=keep)
    meta = {"config": flat_config(**config), "class_names": ["a", "b"], "train": {"loss": [0.1, 3.0]}}
    checkpoints.save(int(state.step), state, iterator, meta)
    checkpoints.close()


def restore(workdir: Path, iterator: TrainIterator, *, state: TrainState | None = None, config=None) -> Any:
    checkpoints = Checkpoints(workdir, keep=2)
    try:
        return checkpoints.restore(state or make_state(0), iterator, config=flat_config(**(config or {})))
    finally:
        checkpoints.close()


def list_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_bits(first, second) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_keeps_every_bit_and_the_place_in_the_data(tmp_path, iterator):
    for _ in range(3):
        next(iterator)
    save(tmp_path, make_state(3), iterator)
    following = next(iterator)
    restored, meta = restore(tmp_path, iterator)
    assert_same_bits(restored, make_state(3))
    assert meta["train"] == {"loss": [0.1, 3.0]}
    assert meta["class_names"] == ["a", "b"]
    assert meta["config"] == flat_config()
    np.testing.assert_array_equal(next(iterator)["images"], following["images"])


def test_trap_28_prefetching_does_not_move_the_saved_place(tmp_path, iterator):
    iterator.start_prefetch()
    next(iterator)
    next(iterator)
    save(tmp_path, make_state(2), iterator)
    assert read_checkpoint(tmp_path)[1]["iterator"]["next_batch"] == 2


def test_there_is_nothing_to_restore_in_a_new_workdir(tmp_path, iterator):
    assert restore(tmp_path, iterator) is None


def test_the_newest_stay(tmp_path, iterator):
    for step in (1, 2, 5, 9):
        save(tmp_path, make_state(step), iterator, keep=3)
    assert list_steps(tmp_path) == [2, 5, 9]


def test_a_step_that_is_there_is_not_written_again(tmp_path, iterator):
    save(tmp_path, make_state(4), iterator)
    save(tmp_path, dataclasses.replace(make_state(5), step=jnp.int32(4)), iterator)
    assert_same_bits(restore(tmp_path, iterator)[0], make_state(4))


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    """A bit in each of five places over the file."""
    data = bytearray(file.read_bytes())
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        data[int(share * len(data))] ^= 4
    file.write_bytes(data)


# Where one array cannot be read, Orbax closes its event loop under the reads of the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_delete, _truncate, _flip])
def test_whatever_file_is_damaged_the_state_is_sound(tmp_path, iterator, damage, caplog):
    """Of the newest checkpoint where the file does not matter, else, reported, of the one before it."""
    original = tmp_path / "original"
    save(original, make_state(1), iterator)
    next(iterator)
    save(original, make_state(2), iterator)
    newest = original / "checkpoints" / "2"
    files = [p.relative_to(newest) for p in sorted(newest.rglob("*")) if p.is_file() and p.stat().st_size]
    outcomes = {}
    for i, file in enumerate(files):
        workdir = tmp_path / str(i)
        shutil.copytree(original, workdir)
        damage(workdir / "checkpoints" / "2" / file)
        caplog.clear()
        state, meta = restore(workdir, iterator)
        step = outcomes[str(file)] = int(state.step)
        assert_same_bits(state, make_state(step))
        assert iterator.get_state()["next_batch"] == meta["iterator"]["next_batch"] == step - 1
        if step == 1:
            assert "checkpoint 2 is damaged" in caplog.text
            assert (workdir / "damaged_checkpoints" / "2").is_dir()
            assert list_steps(workdir) == [1]
            save(workdir, make_state(2), iterator)  # the place is free
            assert int(restore(workdir, iterator)[0].step) == 2
    needed = {file: step for file, step in outcomes.items() if re.match("meta/meta|state/(d/|manifest)", file)}
    assert len(needed) >= 3
    assert set(needed.values()) == {1}


@pytest.mark.parametrize("name", ["iterator", "config"])
def test_a_flipped_digit_of_the_meta_is_damage(tmp_path, iterator, name):
    save(tmp_path, make_state(1), iterator)
    save(tmp_path, make_state(2), iterator)
    file = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    text = file.read_text()
    old, new = {"iterator": ('"next_batch":0', '"next_batch":1'), "config": ('"seed":0', '"seed":1')}[name]
    changed = text.replace(old, new) if old in text else text.replace(old.replace(":", ": "), new)
    assert changed != text
    file.write_text(changed)
    assert int(restore(tmp_path, iterator)[0].step) == 1
    assert iterator.get_state()["next_batch"] == 0


def test_damaged_checkpoints_that_were_set_aside_before_stay(tmp_path, iterator):
    for _ in range(2):
        save(tmp_path, make_state(1), iterator)
        save(tmp_path, make_state(2), iterator)
        _flip(tmp_path / "checkpoints" / "2" / "meta" / "metadata")
        restore(tmp_path, iterator)
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["2", "2.1"]


def test_where_all_are_damaged_nothing_is_moved(tmp_path, iterator):
    for step in (1, 2):
        save(tmp_path, make_state(step), iterator)
        _truncate(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .2: .*; 1: .*") as error:
        restore(tmp_path, iterator)
    assert "\n" not in str(error.value)
    assert list_steps(tmp_path) == [1, 2]
    assert not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name", "mobilenet_v3_small"),
        ("model.width", 0.5),
        ("model.stride_one", [0]),
        ("data.source", "tfds:fashion_mnist"),
        ("data.train_images", 60_000),
        ("data.batch_size", 128),
        ("data.holdout", 0.1),
        ("optim.name", "adamw"),
        ("processes", 2),
        ("parallel", "pmap"),
        ("seed", 1),
        ("ema.decay", 0.9),
    ],
)
def test_another_run_is_refused_and_the_difference_spelled_out(saved, iterator, key, value):
    before = flat_config()[key]
    with pytest.raises(CheckpointMismatchError, match=re.escape(f"{key} was")) as error:
        restore(saved, iterator, config={key: value})
    assert str(before) in str(error.value)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)
    assert list_steps(saved) == [1]


def test_all_differences_are_named(tmp_path, iterator):
    saved, config = flat_config(), flat_config(**{"model.width": 0.5, "optim.name": "adamw"})
    with pytest.raises(CheckpointMismatchError, match=r"model.width was 1.0 and is 0.5; optim.name was 'sgd'"):
        check_same_run(saved, config, tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "train.epochs",
        "train.steps",
        "train.save_every_epochs",
        "optim.lr_per_256",
        "optim.l2",
        "data.data_dir",
        "data.path",
        "data.workers",
        "model.lowering",
        "model.depthwise_impl",
        "model.precision",
        "model.remat",
    ],
)
def test_what_does_not_change_the_state_may_change(saved, iterator, key):
    state, _ = restore(saved, iterator, config={key: "another"})
    assert int(state.step) == 1


def test_arrays_of_another_shape_are_refused(tmp_path, iterator):
    save(tmp_path, make_state(1, width=4), iterator)
    with pytest.raises(CheckpointMismatchError, match=r"was \['float32', .*\] and is .*8 arrays differ"):
        restore(tmp_path, iterator, state=make_state(0, width=8))


def test_read_checkpoint_names_every_leaf(tmp_path, iterator):
    state = make_state(7)
    save(tmp_path, state, iterator)
    leaves, meta = read_checkpoint(tmp_path)
    assert leaves["params.stem.conv.kernel"].tobytes() == np.asarray(state.params["stem"]["conv"]["kernel"]).tobytes()
    assert leaves["step"] == 7
    assert meta["shapes"].keys() == leaves.keys()
    assert len(leaves) == len(jax.tree.leaves(state))


def test_evaluation_may_have_another_number_of_processes_than_the_run(tmp_path, iterator):
    save(tmp_path, make_state(3), iterator, processes=8)
    found = read_state(epath.Path(tmp_path), make_state(0), config=flat_config(processes=1))
    assert found is not None
    assert_same_bits(found[0], make_state(3))
    with pytest.raises(CheckpointMismatchError, match="seed was 0 and is 1"):
        read_state(epath.Path(tmp_path), make_state(0), config=flat_config(seed=1))
    assert read_state(epath.Path(tmp_path / "empty"), make_state(0), config=flat_config()) is None


def test_a_checkpoint_that_the_run_deletes_while_it_is_read_is_no_damage(tmp_path, iterator, monkeypatch):
    save(tmp_path, make_state(1), iterator)
    save(tmp_path, make_state(2), iterator)
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(tmp_path / "later")

    def read_leaves(where, meta):
        if where.name == "1":
            shutil.rmtree(where)
            (tmp_path / "later").rename(folder / "2")
        return reading.read_leaves(where, meta)

    monkeypatch.setattr(checkpoint, "read_leaves", read_leaves)
    found = read_state(epath.Path(tmp_path), make_state(0), config=flat_config())
    assert found is not None
    assert_same_bits(found[0], make_state(2))


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Error reading local file [OS error 24: Too many open files]"),
    ],
)
@pytest.mark.parametrize("lasts", [False, True])
def test_a_read_that_fails_is_repeated_and_nothing_is_moved(tmp_path, iterator, monkeypatch, caplog, problem, lasts):
    for step in (1, 2):
        save(tmp_path, make_state(step), iterator)
    original, calls = ocp.StandardCheckpointHandler.restore, []

    def fail(self, *arguments, **options):
        calls.append(1)
        if lasts or len(calls) < 3:
            raise problem
        return original(self, *arguments, **options)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0, 0.0))
    if lasts:
        with pytest.raises(OSError, match=r"checkpoints/2 could not be read in 4 attempts: .*; nothing was") as error:
            restore(tmp_path, iterator)
        assert "\n" not in str(error.value)
    else:
        assert_same_bits(restore(tmp_path, iterator)[0], make_state(2))
        assert "checkpoints/2 could not be read (" in caplog.text
    assert list_steps(tmp_path) == [1, 2]
    assert not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize(("theirs", "step"), [(0, 2), (1, 1), (2, None)])
def test_hosts_decide_together_what_is_damaged(tmp_path, iterator, monkeypatch, theirs, step):
    """Another host reports `theirs` of checkpoint 2: 0 for intact, 1 for damaged, 2 for a read that failed."""
    for number in (1, 2):
        save(tmp_path, make_state(number), iterator)
    answers = iter([theirs, 0])

    def gather(mine):
        other = mine if np.ndim(mine) else np.int32(next(answers))
        return np.stack([mine, other])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", lambda name: None)
    if step is None:
        with pytest.raises(OSError, match="checkpoints/2 could not be read on another host"):
            restore(tmp_path, iterator)
    else:
        assert int(restore(tmp_path, iterator)[0].step) == step
    assert (tmp_path / "damaged_checkpoints" / "2").exists() == (theirs == 1)


def test_hosts_that_see_different_checkpoints_are_refused(tmp_path, iterator, monkeypatch):
    save(tmp_path, make_state(1), iterator)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, np.zeros_like(mine)]))
    with pytest.raises(OSError, match=r"the hosts see different checkpoints in .*; valid: a workdir that all share"):
        restore(tmp_path, iterator)


def test_changes_of_unprotected_keys_are_named(tmp_path, iterator, caplog):
    before: dict[str, Any] = {"optim.lr_per_256": 0.1}
    save(tmp_path, make_state(1), iterator, **before)
    with caplog.at_level(logging.INFO, logger="absl"):
        restore(tmp_path, iterator, config={"optim.lr_per_256": 0.2, "data.crop": "pad"})
    said = [record.message for record in caplog.records if " was " in record.message]
    assert "optim.lr_per_256 was 0.1 and is 0.2 since the checkpoint of step 1" in said
    assert len(said) == 2


def test_every_key_that_stored_runs_lack_has_the_value_that_they_had():
    stored = json.loads((Path(__file__).parents[1] / "training" / "begun_before" / "config.json").read_text())
    config = flatten_config(base.get_config())
    assert {key: config[key] for key in config.keys() - stored.keys()} == LATER_KEYS


def test_a_checkpoint_from_before_decode_and_cache_is_continued_also_with_other_values(tmp_path, iterator, caplog):
    save(tmp_path, make_state(1), iterator)
    older = Checkpoints(tmp_path, keep=2)
    config = {key: value for key, value in flat_config().items() if key not in ("data.decode", "data.cache")}
    older.save(2, make_state(2), iterator, {"config": config, "class_names": ["a", "b"], "train": {"loss": [0.1, 3.0]}})
    older.close()
    with caplog.at_level(logging.INFO, logger="absl"):
        restored, _ = restore(tmp_path, iterator, config={"data.decode": "fast"})
    assert_same_bits(restored, make_state(2))
    assert "data.decode was 'exact' and is 'fast' since the checkpoint of step 2" in caplog.messages


def test_a_checkpoint_that_does_not_fit_is_one_sentence(tmp_path, iterator, monkeypatch):
    save(tmp_path, make_state(1), iterator)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Namespace(free=100))
        said = (
            r"checkpoints/2 could not be written: its 0.0 MB do not fit; 0.0 MB are free; free some space and run the"
        )
        with pytest.raises(OSError, match=said) as error:
            save(tmp_path, make_state(2), iterator)
        assert "\n" not in str(error.value)
    assert list_steps(tmp_path) == [1]
    save(tmp_path, make_state(2), iterator)
    assert int(restore(tmp_path, iterator)[0].step) == 2


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error opening zarr:\nFailed to write 289 bytes to file 9"),
    ],
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_sentence(tmp_path, iterator, monkeypatch, problem):
    save(tmp_path, make_state(1), iterator)

    def fail(self, *arguments, **options):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        said = r"checkpoints could not be written: the disk is full or over quota; [\d,.]+ MB are free; free some space"
        with pytest.raises(OSError, match=said) as error:
            save(tmp_path, make_state(2), iterator)
        assert "\n" not in str(error.value)
    save(tmp_path, make_state(2), iterator)
    assert int(restore(tmp_path, iterator)[0].step) == 2


@pytest.mark.parametrize("ema", [True, False])
def test_variables_are_the_averaged_ones_where_there_are_any(tmp_path, iterator, ema):
    state = make_state(1, ema=ema)
    save(tmp_path, state, iterator)
    loaded, _ = load_variables(tmp_path)
    expected = state.ema if ema else {"params": state.params, "batch_stats": state.batch_stats}
    assert_same_bits(loaded, jax.tree.map(np.asarray, expected))


def test_variables_of_what_is_no_run_are_refused(tmp_path, iterator):
    with pytest.raises(FileNotFoundError, match="nowhere holds no checkpoints; valid: the workdir of a run"):
        load_variables(tmp_path / "nowhere")
    Checkpoints(tmp_path / "empty", keep=1).close()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        load_variables(tmp_path / "empty")
    save(tmp_path, make_state(1), iterator)
    _truncate(tmp_path / "checkpoints" / "1" / "meta" / "metadata")
    with pytest.raises(ValueError, match="checkpoints/1 is damaged"):
        load_variables(tmp_path)


def test_merge_takes_all_and_leaves_a_classifier_of_other_classes_fresh(caplog):
    fresh, loaded = make_variables(classes=10, value=0.0), make_variables(classes=3, value=1.0)
    with caplog.at_level(logging.INFO, logger="absl"):
        merged = merge_variables(fresh, loaded, source="there")
    assert "classifier starts afresh" in caplog.text
    expected = make_variables(classes=10, value=1.0)
    expected["params"]["classifier"]["kernel"][:] = 0.0
    assert_same_bits(merged, expected)
    same = make_variables(classes=10, value=1.0)
    assert_same_bits(merge_variables(fresh, same, source="there"), same)


def test_merge_leaves_layers_fresh_that_may_be_absent():
    fresh, loaded = make_variables(value=0.0), make_variables(value=1.0)
    for tree in (loaded["params"], loaded["batch_stats"]):
        tree.pop("stem", None)
    loaded["params"].pop("classifier")
    merged = merge_variables(fresh, loaded, source="there", afresh=("stem",))
    assert_same_bits(merged, fresh)
    with pytest.raises(ValueError, match=r"does not fit the model: .* absent or differ"):
        merge_variables(fresh, loaded, source="there")


def test_merge_refuses_another_network():
    match = "init 'there' does not fit the model: 2 arrays .* first batch_stats/stem/norm/mean"
    with pytest.raises(ValueError, match=match):
        merge_variables(make_variables(width=4), make_variables(width=8), source="there")
