"""Checkpoints of one instant: training state, data iterator and config, written by Orbax, verified when read."""

import itertools
import zlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from mobilenet_jax.steps import TrainState

# Keys under which a saved run may not be continued with another value: the state or the data would not fit.
# A trailing dot stands for a whole section.
PROTECTED = (
    "seed",
    "parallel",
    "model.",
    "data.source",
    "data.image_size",
    "data.batch_size",
    "data.holdout",
    "data.num_classes",
    "optim.name",
    "optim.freeze",
    "processes",
)
# Where data may move to another disk.
_FREE_MODEL_KEYS = ("model.lowering", "model.depthwise_impl", "model.remat")


class CheckpointMismatchError(ValueError):
    """A checkpoint that belongs to another run; the message spells out the difference."""


class Checkpoints:
    """The checkpoints of one workdir, in `WORKDIR/checkpoints/STEP`."""

    def __init__(self, workdir: Path, *, keep: int):
        """Open or create; `keep` of the newest stay."""
        self._directory = (workdir / "checkpoints").absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        items = ("state", "iterator", "meta")
        return ocp.CheckpointManager(self._directory, options=options, item_names=items)

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator, meta: dict) -> None:
        """Write in the background; a step that is there already is left as it is.

        The state is copied to the host first, since the next step reuses its buffers. `meta` is JSON: the config and
        what the host has accumulated.
        """
        if step in self._manager.all_steps():
            return
        leaves = _name_leaves(jax.tree.map(np.array, state))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            iterator=grain.checkpoint.CheckpointSave(iterator),  # pyright: ignore[reportCallIssue]
            meta=ocp.args.JsonSave({**meta, "shapes": _shapes(leaves), "checksum": _checksum(leaves)}),
        )
        self._manager.save(step, args=args)

    def restore(
        self, state: TrainState, iterator: grain.DatasetIterator, *, config: dict
    ) -> tuple[TrainState, dict] | None:
        """(state, meta) of the newest sound checkpoint, with the iterator moved to it; None where there is none.

        `state` gives the structure and may be of `jax.ShapeDtypeStruct`. Damaged checkpoints that are newer are
        reported and moved to `WORKDIR/damaged_checkpoints`.

        Raises:
          CheckpointMismatchError: `config` (flat, dotted keys) or the state differs in what must not.
          ValueError: no checkpoint is sound; all stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, state, iterator, config)
            except CheckpointMismatchError:
                raise
            except Exception as error:  # whatever Orbax, TensorStore or JSON make of a damaged file
                damaged[step] = (str(error) or type(error).__name__).splitlines()[0][:200]
                continue
            if damaged:
                self._set_aside(damaged)
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(f"no checkpoint in {self._directory} can be read ({reasons}); give another --workdir")
        return None

    def _read(self, step: int, state: TrainState, iterator: grain.DatasetIterator, config: dict):
        where = self._directory / str(step)
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        check_same_run(meta["config"], config, where)
        template = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _name_leaves(state).items()}
        shapes, saved = _shapes(template), meta["shapes"]
        if changed := sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n) != saved.get(n)):
            raise CheckpointMismatchError(
                f"{where} was written by another model or optimizer: {changed[0]} was {saved.get(changed[0])} and is "
                f"{shapes.get(changed[0])}, {len(changed)} arrays differ in all; give another --workdir"
            )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(template),
            iterator=grain.checkpoint.CheckpointRestore(iterator),  # pyright: ignore[reportCallIssue]
        )
        leaves = self._manager.restore(step, args=args).state
        if _checksum(leaves) != meta["checksum"]:
            raise ValueError("its checksum differs")
        return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in template]), meta

    def _set_aside(self, damaged: dict[int, str]) -> None:
        aside = self._directory.parent / "damaged_checkpoints"
        self._manager.close()
        for step, reason in damaged.items():
            logging.warning("checkpoint %d is damaged (%s); moved to %s, using the one before", step, reason, aside)
            if jax.process_index() == 0:
                aside.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(_free_name(aside / str(step)))
        self._manager = self._open()

    def wait(self) -> None:
        """Until everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait and release the threads."""
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


def load_variables(workdir: str) -> tuple[dict, dict]:
    """({"params", "batch_stats"}, meta) of a workdir's newest checkpoint, averaged ones if it has them.

    Raises FileNotFoundError if there is none.
    """
    directory = Path(workdir).absolute() / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"init is {workdir!r}, which holds no checkpoints; valid: the workdir of a run")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory, options=options, item_names=("state", "meta")) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"init is {workdir!r}, which holds no finished checkpoint yet")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        template = {name: np.empty(shape, dtype) for name, (dtype, shape) in meta["shapes"].items()}
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))
    state: dict[str, Any] = traverse_util.unflatten_dict(restored.state, sep=".")
    return {name: state.get("ema", state)[name] for name in ("params", "batch_stats")}, meta


def merge_variables(fresh: dict, loaded: dict, *, source: str) -> dict:
    """`fresh` with every leaf taken from `loaded`, except a classifier of another shape, which stays fresh and is said.

    Raises ValueError naming the leaves that do not fit.
    """
    flat, given = traverse_util.flatten_dict(fresh, sep="/"), traverse_util.flatten_dict(loaded, sep="/")
    misfits = {
        path for path in flat.keys() | given.keys() if np.shape(flat.get(path)) != np.shape(given.get(path))
    }
    wrong = sorted(path for path in misfits if not path.startswith("params/classifier/"))
    if wrong:
        raise ValueError(
            f"init {source!r} does not fit the model: {len(wrong)} arrays are absent or differ in shape, "
            f"the first {wrong[0]}; use the model section of the run that wrote it"
        )
    if misfits:
        logging.info("init: the classifier starts afresh, since %s has another number of classes", source)
    merged = {path: given[path] if path in given and path not in misfits else leaf for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(merged, sep="/")


def _name_leaves(state: Any) -> dict[str, Any]:
    """{"params.stem.conv.kernel": leaf}: flat, so that containers that are empty need no place in a checkpoint."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _shapes(leaves: dict[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def _checksum(leaves: dict[str, np.ndarray]) -> int:
    """CRC-32 over all leaves: a flipped bit inside a chunk would pass Orbax unnoticed."""
    value = 0
    for name in sorted(leaves):
        value = zlib.crc32(np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8).data, value)
    return value


def _free_name(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    names = (path if i == 0 else path.with_name(f"{path.name}.{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())
