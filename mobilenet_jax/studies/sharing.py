"""Results that a study takes over: another study beside it has finished a run with the same config."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from mobilenet_jax.studies.records import RECORD_FILE, read_record, write_record
from mobilenet_jax.studies.study import FREE_KEYS, RunKey, Study
from mobilenet_jax.training.config import flatten_config

FILES = ("environment.json", "metrics.jsonl", "result.json")  # what a report reads; checkpoints stay where they are


def find_finished(study: Study, key: RunKey, workdir: Path) -> Path | None:
    """Return the folder of a finished run with the config and the seed of `key`, in a study beside `workdir`, or None.

    The other studies are the folders beside the workdir. Their runs that took results over do not count, and neither do
    damaged records.
    """
    wanted = _identify(flatten_config(study.make_config(key)))
    for folder in _list_runs(workdir):
        try:
            record = read_record(folder)
        except ValueError:  # the other study reports its damage
            continue
        if record is None or record["status"] != "finished" or "taken_from" in record:
            continue
        if _identify(record["config"]) == wanted and all((folder / name).is_file() for name in FILES):
            return folder
    return None


def take_over(study: Study, key: RunKey, workdir: Path, source: Path) -> None:
    """Copy the results of a run of another study to this study, with a record that says where they are from."""
    folder = key.folder(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    own = {"study": study.name, "variant": key.variant, "seed": key.seed, "taken_from": str(source)}
    write_record(folder, {**(read_record(source) or {}), **own, "config": flatten_config(study.make_config(key))})


def _list_runs(workdir: Path) -> Iterator[Path]:
    for path in sorted(workdir.resolve().parent.glob(f"*/*/seed_*/{RECORD_FILE}")):
        if workdir.resolve() not in path.parents:
            yield path.parent


def _identify(flat: dict) -> dict:
    """Return the keys of a flat config that decide what a run computes."""
    return {name: value for name, value in flat.items() if name not in FREE_KEYS}
