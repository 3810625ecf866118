"""Checkpoints: training state, data iterator and config of one step, written by Orbax and verified when read."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from mobilenet_jax.paths import as_path, is_bucket
from mobilenet_jax.workdir.files import DiskFullError, move_folder, naming_a_full_disk
from mobilenet_jax.workdir.later_keys import complete
from mobilenet_jax.workdir.reading import (
    CheckpointReadError,
    DamagedError,
    checksum_leaves,
    checksum_meta,
    list_steps,
    read_leaves,
    read_meta,
)
from mobilenet_jax.workdir.s3 import is_s3, upload

TEACHER_KEY = "train.distill.sha256"  # of the teacher's weights, which a config names by their place
# A run cannot be resumed with another value of these keys, because the state or the data would not fit. A name that
# ends in a dot stands for a whole section.
PROTECTED = (
    "seed",
    "parallel",
    "model.",
    "data.source",
    "data.image_size",
    "data.batch_size",
    "data.holdout",
    "data.num_classes",
    "data.train_images",
    "optim.name",
    "optim.freeze",
    "optim.freeze_epochs",
    TEACHER_KEY,
    "train.quantize",
    "processes",
)
# These choose another formulation of the same network.
_FREE_MODEL_KEYS = ("model.lowering", "model.depthwise_impl", "model.precision", "model.remat")
_ITEMS = ("state", "meta")


class CheckpointMismatchError(ValueError):
    """The checkpoint belongs to another run; the message names the differences."""


class Checkpoints:
    """The checkpoints of one workdir, in `WORKDIR/checkpoints/STEP`."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int, check: Callable[[], None] = lambda: None):
        """Open or create the folder; keep the newest `keep` checkpoints.

        Call this only for a run that holds the lock of the workdir, because it deletes checkpoints that are half
        written. Each save calls `check` first, which raises if the lock is lost.
        """
        self._check = check
        self._home = self._directory = _find_directory(as_path(workdir))
        self._stage = tempfile.TemporaryDirectory() if is_s3(self._home) else None
        if self._stage:
            if jax.process_count() > 1:
                raise ValueError(
                    f"{workdir} lies in S3, which takes checkpoints of one process; valid: gs://..., a disk"
                )
            self._directory = epath.Path(self._stage.name) / "checkpoints"
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # A bucket cannot rename a folder at once, so the last file that a save writes there says that it is whole.
        commit = ocp.path.atomicity.CommitFileTemporaryPath if is_bucket(self._directory) else None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, cleanup_tmp_directories=True, temporary_path_class=commit
        )
        return ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, meta: dict) -> None:
        """Write in the background, unless the step has been saved already.

        The state is copied to the host first, because the next step reuses its buffers. `meta` is JSON: the config and
        the values that the host has accumulated.
        """
        self._check()
        if step in self._list_steps():
            return
        leaves = _name_leaves(jax.tree.map(np.array, state))
        self._check_space(step, sum(leaf.nbytes for leaf in leaves.values()))
        meta = {
            **meta,
            "iterator": iterator.get_state(),
            "shapes": _shapes(leaves),
            "checksum": checksum_leaves(leaves),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            meta=ocp.args.JsonSave({"content": meta, "checksum": checksum_meta(meta)}),
        )
        with naming_a_full_disk(self._directory):
            self._manager.save(step, args=args)
            if self._stage:
                self._manager.wait_until_finished()
                upload(self._directory / str(step), self._home / str(step), keep=self._keep)

    def _list_steps(self) -> Sequence[int]:
        return list_steps(self._home) if self._stage else self._manager.all_steps()

    def _check_space(self, step: int, size: int) -> None:
        """Raise DiskFullError if `size` bytes do not fit, before Orbax writes a half and prints pages of tracebacks."""
        first = jax.process_index() == 0
        if first and not is_bucket(self._directory) and shutil.disk_usage(self._directory).free < size:
            raise DiskFullError(self._directory / str(step), f"its {size / 1e6:,.1f} MB do not fit")

    def restore(self, state: Any, iterator: grain.DatasetIterator, *, config: dict) -> tuple[Any, dict] | None:
        """Return (state, meta) of the newest intact checkpoint and move the iterator to it; None if there are none.

        `state` gives the structure; its leaves may be `jax.ShapeDtypeStruct`. Newer checkpoints that are damaged are
        logged and moved to `WORKDIR/damaged_checkpoints`. All processes decide together which are damaged. Each
        difference between `config` (flat, dotted keys) and the config of the checkpoint is logged.

        Raises:
          CheckpointMismatchError: `config` or the state differs where it must not.
          CheckpointReadError: a checkpoint could not be read on this or another host; all stay where they are.
          ValueError: all checkpoints are damaged; they stay where they are.
        """
        steps = sorted(self._list_steps(), reverse=True)
        _check_same_steps(self._home, steps)
        damaged: dict[int, str] = {}
        for step in steps:
            found = _read_together(self._home / str(step), state, config)
            if isinstance(found, str):
                damaged[step] = found
                continue
            if damaged:
                self._set_aside(damaged)
            iterator.set_state(found[1]["iterator"])
            for difference in list_differences(complete(found[1]["config"]), config):
                logging.info("%s since the checkpoint of step %d", difference, step)
            return found
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"no checkpoint in {self._home} can be read ({reasons}); give another --workdir")
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        aside = self._home.parent / "damaged_checkpoints"
        self._manager.close()
        for step, reason in damaged.items():
            logging.warning("checkpoint %d is damaged (%s); moved to %s, using the one before it", step, reason, aside)
            if jax.process_index() == 0:
                move_folder(self._home / str(step), _free_name(aside / str(step)))
        multihost_utils.sync_global_devices("damaged checkpoints are aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of a save that failed in the background."""
        with naming_a_full_disk(self._directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for saves and stop the threads."""
        with naming_a_full_disk(self._directory):
            self._manager.close()
        if self._stage:
            self._stage.cleanup()


def check_same_run(saved: dict, config: dict, where: epath.Path) -> None:
    """Raise CheckpointMismatchError, naming each difference, unless a run of `config` may continue from `saved`."""

    saved = complete(saved)

    def protected(key: str) -> bool:
        return key not in _FREE_MODEL_KEYS and any(
            key == name or (name.endswith(".") and key.startswith(name)) for name in PROTECTED
        )

    keys = [key for key in sorted(saved.keys() | config.keys()) if protected(key)]
    differences = list_differences({key: saved.get(key) for key in keys}, {key: config.get(key) for key in keys})
    if (saved["ema.decay"] > 0) != (config["ema.decay"] > 0):
        differences.append(f"ema.decay was {saved['ema.decay']} and is {config['ema.decay']}")
    if differences:
        raise CheckpointMismatchError(
            f"{where} was written by another run: {'; '.join(differences)}; "
            "restore these values or give another --workdir"
        )


def list_differences(saved: dict, config: dict) -> list[str]:
    """Return "optim.lr_per_256 was 0.1 and is 0.2" for each key with another value, sorted by key."""
    keys = sorted(saved.keys() | config.keys())
    return [
        f"{key} was {saved.get(key)!r} and is {config.get(key)!r}" for key in keys if saved.get(key) != config.get(key)
    ]


def read_state(workdir: epath.Path, state: Any, *, config: dict) -> tuple[Any, dict] | None:
    """Return (state, meta) of a workdir's newest finished checkpoint, without changing it; None if there is none.

    A run may write there at the same time. The number of processes may differ from that of the run, and the teacher may
    be absent.

    Raises CheckpointMismatchError, DamagedError or CheckpointReadError.
    """
    directory = _find_directory(workdir)
    while step := _agree_on_newest(directory):
        where = directory / str(step)
        try:
            return _read_state(where, state, config, free=("processes", TEACHER_KEY))
        except DamagedError:
            if step in list_steps(directory):
                raise
            # The run has deleted this checkpoint in the meantime, because it has written newer ones.
    return None


def _agree_on_newest(directory: epath.Path) -> int:
    """Return the newest step of the first process; 0 if there is none."""
    newest = max(list_steps(directory), default=0)
    return int(multihost_utils.broadcast_one_to_all(np.int32(newest)))


def _read_state(where: epath.Path, state: Any, config: dict, *, free: Sequence[str] = ()) -> tuple[Any, dict]:
    meta = read_meta(where)
    check_same_run(meta["config"], {**config, **{key: meta["config"].get(key) for key in free}}, where)
    template = _name_leaves(state)
    shapes, saved = _shapes(template), meta["shapes"]
    if changed := sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n)):
        raise CheckpointMismatchError(
            f"{where} was written by another model or optimizer: {changed[0]} was {saved.get(changed[0])} and is "
            f"{shapes.get(changed[0])}, {len(changed)} arrays differ in all; give another --workdir"
        )
    leaves = read_leaves(where, meta)
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in template]), meta


def _read_together(where: epath.Path, state: Any, config: dict) -> tuple[Any, dict] | str:
    """Return (state, meta), or the reason why the checkpoint is damaged on this or another host.

    Every process must call this, because they decide together: the worst outcome counts.

    Raises CheckpointMismatchError or CheckpointReadError, on all processes if on one of them.
    """
    found, problem = None, None
    try:
        found = _read_state(where, state, config)
    except (CheckpointMismatchError, DamagedError, CheckpointReadError) as error:
        problem = error
    mine = 0 if problem is None else 1 if isinstance(problem, DamagedError) else 2
    worst = int(np.max(multihost_utils.process_allgather(np.int32(mine))))
    if worst == 2:
        raise problem if mine == 2 and problem else CheckpointReadError(f"{where} could not be read on another host")
    if worst == 1 or found is None:
        return problem.reason if isinstance(problem, DamagedError) else "on another host"
    return found


def _check_same_steps(directory: epath.Path, steps: Sequence[int]) -> None:
    """Raise CheckpointReadError on all processes unless all of them see the same checkpoints."""
    seen = np.array([len(steps), sum(steps), max(steps, default=0)])
    if np.any(multihost_utils.process_allgather(seen) != seen):
        raise CheckpointReadError(
            f"the hosts see different checkpoints in {directory}, here {list(steps)}; valid: a workdir that all share"
        )


def _find_directory(workdir: epath.Path) -> epath.Path:
    directory = workdir / "checkpoints"
    return directory if is_bucket(directory) else directory.absolute()


def read_checkpoint(workdir: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Return ({"params.stem.conv.kernel": array, ...}, meta) of a workdir's newest checkpoint, without changing it.

    `workdir` may also be WORKDIR/checkpoints/STEP, for a checkpoint that is not the newest. Raises FileNotFoundError if
    there is no checkpoint, DamagedError if it is damaged, CheckpointReadError if it cannot be read.
    """
    directory, step = _find_directory(as_path(workdir)), None
    if directory.parent.parent.name == "checkpoints" and directory.parent.name.isdecimal():
        directory, step = directory.parent.parent, int(directory.parent.name)
    if not directory.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints; valid: the workdir of a run")
    steps = list_steps(directory)
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{workdir} holds no finished checkpoint yet")
    where = directory / str(step)
    meta = read_meta(where)
    return read_leaves(where, meta), meta


def load_variables(workdir: str | os.PathLike) -> tuple[dict, dict]:
    """Return ({"params", "batch_stats"}, meta) of a workdir's newest checkpoint: the averaged variables if it has them.

    `meta` also has the step. Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged.
    """
    leaves, meta = read_checkpoint(workdir)
    state: dict[str, Any] = traverse_util.unflatten_dict(leaves, sep=".")
    variables = {name: state.get("ema", state)[name] for name in ("params", "batch_stats")}
    return variables, {**meta, "step": int(leaves["step"])}


def load_ranges(workdir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the ranges of the int8 network that a workdir's newest checkpoint holds, by tensor; {} of a float run.

    They belong to the variables that `load_variables` returns. Raises what `load_variables` raises.
    """
    leaves, _ = read_checkpoint(workdir)
    prefix = "ema.ranges." if any(name.startswith("ema.") for name in leaves) else "ranges."
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def merge_variables(fresh: dict, loaded: dict, *, source: str, afresh: tuple[str, ...] = ()) -> dict:
    """Return `loaded`, with the classifier of `fresh` if its shape differs, which is logged.

    The layers `afresh` are those of `fresh` if `loaded` lacks them. Raises ValueError, which names the first leaf, if
    other leaves differ.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(fresh, sep="/")
    given: dict[str, Any] = traverse_util.flatten_dict(loaded, sep="/")
    shapes, given_shapes = ({path: np.shape(leaf) for path, leaf in tree.items()} for tree in (flat, given))
    misfits = {path for path in flat.keys() | given.keys() if shapes.get(path) != given_shapes.get(path)}
    absent = {path for path in misfits - given.keys() if path.split("/")[1] in afresh}
    wrong = sorted(path for path in misfits - absent if not path.startswith("params/classifier/"))
    if wrong:
        raise ValueError(
            f"init {source!r} does not fit the model: {len(wrong)} arrays are absent or differ in shape, "
            f"the first {wrong[0]}; use the model section of the run that wrote it"
        )
    if absent:
        layers = ", ".join(sorted({path.split("/")[1] for path in absent}))
        logging.info("init: %s start afresh, because %s lacks them", layers, source)
    if misfits - absent:
        logging.info("init: the classifier starts afresh, because %s has none for this number of classes", source)
    merged = {path: given[path] if path in given and path not in misfits else leaf for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(merged, sep="/")


def _name_leaves(state: Any) -> dict[str, Any]:
    """Return {"params.stem.conv.kernel": leaf}, which leaves out empty containers."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _shapes(leaves: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _free_name(path: epath.Path) -> epath.Path:
    """Return `path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path if i == 0 else path.with_name(f"{path.name}.{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())
