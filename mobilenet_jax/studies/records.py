"""The records of the runs in a study's workdir: config, status and time. Nothing here imports JAX."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.studies.study import FREE_KEYS, RunKey, Study
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.workdir.files import write_json_atomic
from mobilenet_jax.workdir.later_keys import complete

STATUSES = ("started", "finished", "failed")
RECORD_FILE = "run.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run in `folder`, or None if the run was never started.

    "config" is flat, with the keys that it is too old to have. "status" is one of STATUSES. "seconds" is the total time
    of all attempts, except those that ended by kill -9. "error" says why a run failed. Raises ValueError if the file is
    damaged.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        check_choice("status", record["status"], STATUSES)
        record["config"] = complete(record["config"])
        _ = record["seconds"] + 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of a run: {error}; remove {folder} to run it again") from error
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace the record of the run in `folder` atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / RECORD_FILE, record)


def check_record(study: Study, key: RunKey, workdir: Path) -> None:
    """Raise ValueError, naming the keys, if the run was started with a config that differs from the study's."""
    record = read_record(key.folder(workdir))
    if record is None:
        return
    old, new = record["config"], flatten_config(study.make_config(key))
    changed = sorted(k for k in old.keys() | new.keys() if k not in FREE_KEYS and old.get(k) != new.get(k))
    if changed:
        differences = "; ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in changed)
        raise ValueError(
            f"{key.folder(workdir)} was run with another config: {differences}; restore it or give another --workdir"
        )


def find_runs(study: Study, workdir: Path) -> list[RunKey]:
    """List the runs of the study that were started in the workdir, in the order of the sweep, then by seed."""
    found = []
    for variant in study.variants:
        seeds = [path.parent.name.removeprefix("seed_") for path in (workdir / variant).glob(f"seed_*/{RECORD_FILE}")]
        found += [RunKey(seed, variant) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())]
    return found
