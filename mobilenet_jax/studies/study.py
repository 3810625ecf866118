"""A study: a base config, what each variant changes of it, and the folders of its runs. No JAX here."""

import contextlib
import fcntl
import hashlib
import json
import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilenet_jax.models.cost import Cost, compute_cost
from mobilenet_jax.models.spec import Spec, check_choice
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.training.config import flatten_config

FIGURES = ("points", "frontier")
STATUSES = ("started", "finished", "failed")
RECORD_FILE = "run.json"
_NEEDED = ("baseline", "variants", "source")  # of a sweep
_OPTIONAL = ("published", "figure", "series")
# Keys that change nothing of what a run computes, and may change between its parts.
_FREE_KEYS = ("name", "data.data_dir", "data.workers", "train.keep_checkpoints")
# Of the model section, what is no part of the architecture.
_NOT_OF_THE_SPEC = ("dtype", "lowering", "depthwise_impl", "remat")


@dataclass(frozen=True, order=True)
class RunKey:
    """One run of a study."""

    seed: int  # added to the config's own
    variant: str

    def folder(self, workdir: Path) -> Path:
        """Where the run is kept."""
        return workdir / self.variant / f"seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The base config of a file and its sweep: variants in the order of tables and figures."""

    name: str
    config: Any  # of `get_config`, a locked ConfigDict
    baseline: str
    variants: Mapping[str, Mapping[str, Any]]  # name -> {"model.shortcut": "none", ...}
    source: str  # of the paper's answer
    published: Mapping[str, float] = field(default_factory=dict)  # variant -> the paper's top-1, %
    figure: str = "points"  # points | frontier: accuracy against multiply-adds
    series: str = ""  # of a frontier: the key whose values tell its lines apart; empty: one line

    def make_config(self, key: RunKey):
        """The config of one run, locked; ValueError for a key or type that the base does not have."""
        config = self.config.copy_and_resolve_references()
        overrides = {**self.variants[key.variant], "seed": self.config.seed + key.seed}
        try:
            config.update_from_flattened_dict(overrides)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"variant {key.variant} of {self.name}: {str(error).splitlines()[0]}") from error
        config.name = f"{self.name}_{key.variant}"
        return config.lock()

    def make_spec(self, variant: str, num_classes: int) -> Spec:
        """The network of a variant; `num_classes` where the config names none."""
        options = self.make_config(RunKey(0, variant)).model.to_dict()
        options = {name: value for name, value in options.items() if name not in _NOT_OF_THE_SPEC}
        if options["num_classes"] is None:
            options["num_classes"] = num_classes
        return make_spec(**options)

    def compute_cost(self, variant: str, num_classes: int) -> Cost:
        """What an image costs, at the size that the variant sees."""
        return compute_cost(self.make_spec(variant, num_classes), self.make_config(RunKey(0, variant)).data.image_size)

    def group_variants(self) -> dict[str, list[str]]:
        """{label of a frontier's line: its variants}, by their values of the key `series`."""
        groups: dict[str, list[str]] = {}
        for variant in self.variants:
            flat = flatten_config(self.make_config(RunKey(0, variant)))
            groups.setdefault(f"{self.series} {flat[self.series]}" if self.series else "", []).append(variant)
        return groups

    def list_runs(self, seeds: int, variants: Sequence[str]) -> list[RunKey]:
        """The runs in the order of their doing: every variant of a seed before the next seed."""
        return [RunKey(seed, variant) for seed in range(seeds) for variant in self.variants if variant in variants]


def read_study(path: str, config) -> Study:
    """The study of a config file `path[:argument]`, whose `get_config` gave `config`.

    Raises ValueError, in one sentence, where the file has no sweep or one that is ill-formed.
    """
    file = path.split(":")[0]
    sweep = runpy.run_path(file).get("sweep")
    if sweep is None:
        raise ValueError(f"{file} has no sweep(): it is the config of a run, not of a study")
    given = sweep()
    if not isinstance(given, dict) or not {*_NEEDED} <= given.keys() <= {*_NEEDED, *_OPTIONAL}:
        needed, optional = ", ".join(_NEEDED), ", ".join(_OPTIONAL)
        raise ValueError(f"sweep() of {file} must return a dict of {needed}, and, if need be, {optional}")
    study = Study(name=Path(file).stem, config=config, **given)
    check_choice(f"baseline of {file}", study.baseline, tuple(study.variants))
    check_choice(f"figure of {file}", study.figure, FIGURES)
    for name in study.published:
        check_choice(f"published variant of {file}", name, tuple(study.variants))
    for name in study.variants:
        study.make_config(RunKey(0, name))
    return study


def hash_config(flat: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that tell configs apart; those of seeds, places and names alone are equal."""
    kept = {name: value for name, value in flat.items() if name not in (*_FREE_KEYS, "seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


# The record of a run: what the study knows of it beside the files of the run itself.


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run; None where it was never started.

    "config" is flat; "status" is one of STATUSES; "seconds" is the time of all attempts that ended in order, be it by a
    signal, but not by kill -9; "error" says why a run failed.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        check_choice("status", record["status"], STATUSES)
        _ = record["config"].items(), record["seconds"] + 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of a run: {error}; remove {folder} to run it again") from error
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Keep the record of a run, at any moment whole."""
    from mobilenet_jax.workdir.files import write_json_atomic

    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / RECORD_FILE, record)


def check_record(study: Study, key: RunKey, workdir: Path) -> None:
    """Raise ValueError, naming the keys, if the run was started with another config than the study now gives it."""
    record = read_record(key.folder(workdir))
    if record is None:
        return
    old, new = record["config"], flatten_config(study.make_config(key))
    changed = sorted(k for k in old.keys() | new.keys() if k not in _FREE_KEYS and old.get(k) != new.get(k))
    if changed:
        differences = "; ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in changed)
        raise ValueError(
            f"{key.folder(workdir)} was run with another config: {differences}; restore it or give another --workdir"
        )


def find_runs(study: Study, workdir: Path) -> list[RunKey]:
    """The runs of the study that were started in the workdir, in the order of the sweep, then by seed."""
    found = []
    for variant in study.variants:
        seeds = [path.parent.name.removeprefix("seed_") for path in (workdir / variant).glob(f"seed_*/{RECORD_FILE}")]
        found += [RunKey(seed, variant) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())]
    return found


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether the lock on the file `path` is this process's; the system takes it back when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
