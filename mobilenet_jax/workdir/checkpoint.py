"""Checkpoints: training state, data iterator and config of one step, written by Orbax and verified when read."""

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

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
    "processes",
)
# These choose another formulation of the same network.
_FREE_MODEL_KEYS = ("model.lowering", "model.depthwise_impl", "model.precision", "model.remat")
_ITEMS = ("state", "meta")


class CheckpointMismatchError(ValueError):
    """The checkpoint belongs to another run; the message names the differences."""


class Checkpoints:
    """The checkpoints of one workdir, in `WORKDIR/checkpoints/STEP`."""

    def __init__(self, workdir: Path, *, keep: int):
        """Open or create the folder; keep the newest `keep` checkpoints."""
        self._directory = (workdir / "checkpoints").absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, meta: dict) -> None:
        """Write in the background, unless the step has been saved already.

        The state is copied to the host first, because the next step reuses its buffers. `meta` is JSON: the config and
        the values that the host has accumulated.
        """
        if step in self._manager.all_steps():
            return
        leaves = _name_leaves(jax.tree.map(np.array, state))
        meta = {
            **meta,
            "iterator": iterator.get_state(),
            "shapes": _shapes(leaves),
            "checksum": _checksum_leaves(leaves),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            meta=ocp.args.JsonSave({"content": meta, "checksum": _checksum_meta(meta)}),
        )
        self._manager.save(step, args=args)

    def restore(self, state: Any, iterator: grain.DatasetIterator, *, config: dict) -> tuple[Any, dict] | None:
        """Return (state, meta) of the newest intact checkpoint and move the iterator to it; None if there are none.

        `state` gives the structure; its leaves may be `jax.ShapeDtypeStruct`. Newer checkpoints that are damaged are
        logged and moved to `WORKDIR/damaged_checkpoints`.

        Raises:
          CheckpointMismatchError: `config` (flat, dotted keys) or the state differs where it must not.
          ValueError: all checkpoints are damaged; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, state, iterator, config)
            except CheckpointMismatchError:
                raise
            except Exception as error:  # Orbax, TensorStore and JSON raise many kinds for a damaged file
                damaged[step] = _first_line(error)
                continue
            if damaged:
                self._set_aside(damaged)
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"no checkpoint in {self._directory} can be read ({reasons}); give another --workdir")
        return None

    def _read(self, step: int, state: Any, iterator: grain.DatasetIterator, config: dict):
        where = self._directory / str(step)
        meta = _read_meta(self._manager, step)
        check_same_run(meta["config"], config, where)
        template = _name_leaves(state)
        shapes, saved = _shapes(template), meta["shapes"]
        if changed := sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n)):
            raise CheckpointMismatchError(
                f"{where} was written by another model or optimizer: {changed[0]} was {saved.get(changed[0])} and is "
                f"{shapes.get(changed[0])}, {len(changed)} arrays differ in all; give another --workdir"
            )
        leaves = _read_leaves(self._manager, step, meta)
        iterator.set_state(meta["iterator"])
        return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in template]), meta

    def _set_aside(self, damaged: dict[int, str]) -> None:
        aside = self._directory.parent / "damaged_checkpoints"
        self._manager.close()
        for step, reason in damaged.items():
            logging.warning("checkpoint %d is damaged (%s); moved to %s, using the one before it", step, reason, aside)
            if jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(_free_name(aside / str(step)))
        multihost_utils.sync_global_devices("damaged checkpoints are aside")
        self._manager = self._open()

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of a save that failed in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for saves and stop the threads."""
        self._manager.close()


def check_same_run(saved: dict, config: dict, where: Path) -> None:
    """Raise CheckpointMismatchError, naming each difference, unless a run of `config` may continue from `saved`."""

    def protected(key: str) -> bool:
        return key not in _FREE_MODEL_KEYS and any(
            key == name or (name.endswith(".") and key.startswith(name)) for name in PROTECTED
        )

    differences = [
        f"{key} was {saved.get(key)!r} and is {config.get(key)!r}"
        for key in sorted(saved.keys() | config.keys())
        if protected(key) and saved.get(key) != config.get(key)
    ]
    if (saved["ema.decay"] > 0) != (config["ema.decay"] > 0):
        differences.append(f"ema.decay was {saved['ema.decay']} and is {config['ema.decay']}")
    if differences:
        raise CheckpointMismatchError(
            f"{where} was written by another run: {'; '.join(differences)}; "
            "restore these values or give another --workdir"
        )


def read_checkpoint(workdir: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Return ({"params.stem.conv.kernel": array, ...}, meta) of a workdir's newest checkpoint, without changing it.

    `workdir` may also be WORKDIR/checkpoints/STEP, for a checkpoint that is not the newest. Raises FileNotFoundError if
    there is no checkpoint, ValueError if it is damaged.
    """
    directory, step = Path(workdir).absolute() / "checkpoints", None
    if directory.parent.parent.name == "checkpoints" and directory.parent.name.isdecimal():
        directory, step = directory.parent.parent, int(directory.parent.name)
    if not directory.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints; valid: the workdir of a run")
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(directory, options=options, item_names=_ITEMS) as manager:
        step = manager.latest_step() if step is None else step
        if step not in manager.all_steps():
            raise FileNotFoundError(f"{workdir} holds no finished checkpoint yet")
        try:
            meta = _read_meta(manager, step)
            return _read_leaves(manager, step, meta), meta
        except Exception as error:  # as in `Checkpoints.restore`
            raise ValueError(f"{directory / str(step)} is damaged: {_first_line(error)}") from error


def load_variables(workdir: str | Path) -> tuple[dict, dict]:
    """Return ({"params", "batch_stats"}, meta) of a workdir's newest checkpoint: the averaged variables if it has them.

    `meta` also has the step. Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged.
    """
    leaves, meta = read_checkpoint(workdir)
    state: dict[str, Any] = traverse_util.unflatten_dict(leaves, sep=".")
    variables = {name: state.get("ema", state)[name] for name in ("params", "batch_stats")}
    return variables, {**meta, "step": int(leaves["step"])}


def merge_variables(fresh: dict, loaded: dict, *, source: str) -> dict:
    """Return `loaded`, with the classifier of `fresh` if its shape differs, which is logged.

    Raises ValueError, which names the first leaf, if other leaves differ.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(fresh, sep="/")
    given: dict[str, Any] = traverse_util.flatten_dict(loaded, sep="/")
    shapes, given_shapes = ({path: np.shape(leaf) for path, leaf in tree.items()} for tree in (flat, given))
    misfits = {path for path in flat.keys() | given.keys() if shapes.get(path) != given_shapes.get(path)}
    wrong = sorted(path for path in misfits if not path.startswith("params/classifier/"))
    if wrong:
        raise ValueError(
            f"init {source!r} does not fit the model: {len(wrong)} arrays are absent or differ in shape, "
            f"the first {wrong[0]}; use the model section of the run that wrote it"
        )
    if misfits:
        logging.info("init: the classifier starts afresh, because %s has another number of classes", source)
    merged = {path: given[path] if path in given and path not in misfits else leaf for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(merged, sep="/")


def _name_leaves(state: Any) -> dict[str, Any]:
    """Return {"params.stem.conv.kernel": leaf}, which leaves out empty containers."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _shapes(leaves: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _checksum_leaves(leaves: dict[str, np.ndarray]) -> int:
    """Return the CRC-32 of all leaves, because Orbax does not notice a flipped bit inside a chunk."""
    value = 0
    for name in sorted(leaves):
        value = zlib.crc32(np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8).data, value)
    return value


def _checksum_meta(meta: dict) -> int:
    """Return the CRC-32 of the JSON: a flipped bit could move the iterator or change the config."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    saved = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if _checksum_meta(saved["content"]) != saved["checksum"]:
        raise ValueError("the checksum of its meta differs")
    return saved["content"]


def _read_leaves(manager: ocp.CheckpointManager, step: int, meta: dict) -> dict[str, np.ndarray]:
    template = {name: np.empty(shape, dtype) for name, (dtype, shape) in meta["shapes"].items()}
    leaves = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))["state"]
    if _checksum_leaves(leaves) != meta["checksum"]:
        raise ValueError("the checksum of its state differs")
    return leaves


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _free_name(path: Path) -> Path:
    """Return `path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path if i == 0 else path.with_name(f"{path.name}.{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())
