"""A study: a base config and the changes that each variant makes to it. Nothing here imports JAX."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilenet_jax.cli.config import load_config, run_config_file
from mobilenet_jax.models.cost import Cost, compute_cost
from mobilenet_jax.models.spec import Spec, check_choice
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.training.config import flatten_config

FIGURES = ("points", "frontier")
# Keys that change nothing in what a run computes. They may change while a run is stopped.
FREE_KEYS = ("name", "data.data_dir", "data.workers", "train.keep_checkpoints")
_NEEDED = ("baseline", "variants", "source")  # keys of a sweep
_OPTIONAL = ("published", "figure", "series")
# Keys of the model section that are not part of the architecture.
_NOT_OF_THE_SPEC = ("dtype", "lowering", "depthwise_impl", "precision", "remat")


@dataclass(frozen=True, order=True)
class RunKey:
    """One run of a study."""

    seed: int  # added to the seed of the config
    variant: str

    def folder(self, workdir: Path) -> Path:
        """Return the workdir of the run."""
        return workdir / self.variant / f"seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The base config of a file and its sweep; tables and figures have the variants in this order."""

    name: str
    config: Any  # the locked ConfigDict that `get_config` returns
    baseline: str
    variants: Mapping[str, Mapping[str, Any]]  # name -> {"model.shortcut": "none", ...}
    source: str  # where the paper answers the question
    published: Mapping[str, float] = field(default_factory=dict)  # variant -> top-1 in the paper, %
    figure: str = "points"  # points | frontier: accuracy against multiply-adds
    series: str = ""  # for a frontier: variants with equal values of this key share a line; empty: one line

    def make_config(self, key: RunKey):
        """Return the locked config of one run.

        Raises ValueError for a key that the base does not have, and for a value of another type.
        """
        config = self.config.copy_and_resolve_references()
        overrides = {**self.variants[key.variant], "seed": self.config.seed + key.seed}
        try:
            config.update_from_flattened_dict(overrides)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"variant {key.variant} of {self.name}: {str(error).splitlines()[0]}") from error
        config.name = f"{self.name}_{key.variant}"
        return config.lock()

    def make_spec(self, variant: str, num_classes: int) -> Spec:
        """Return the network of a variant; `num_classes` is used if the config sets none."""
        options = self.make_config(RunKey(0, variant)).model.to_dict()
        options = {name: value for name, value in options.items() if name not in _NOT_OF_THE_SPEC}
        if options["num_classes"] is None:
            options["num_classes"] = num_classes
        return make_spec(**options)

    def compute_cost(self, variant: str, num_classes: int) -> Cost:
        """Compute the cost of one image at the image size of the variant."""
        return compute_cost(self.make_spec(variant, num_classes), self.make_config(RunKey(0, variant)).data.image_size)

    def group_variants(self) -> dict[str, list[str]]:
        """Return the variants of each line of a frontier, by label; a line shares one value of the key `series`."""
        groups: dict[str, list[str]] = {}
        for variant in self.variants:
            flat = flatten_config(self.make_config(RunKey(0, variant)))
            groups.setdefault(f"{self.series} {flat[self.series]}" if self.series else "", []).append(variant)
        return groups

    def list_runs(self, seeds: int, variants: Sequence[str]) -> list[RunKey]:
        """List the runs in the order of training: all variants with one seed come before the next seed."""
        return [RunKey(seed, variant) for seed in range(seeds) for variant in self.variants if variant in variants]


def load_study(path: str, overrides: list[str]) -> Study:
    """Load the study of `path[:argument]`, a config file or the name of a study, with overrides of its base config.

    Raises ValueError, in one sentence, for a mistake in the file or in the overrides, and for an override of a key
    that a variant sets.
    """
    study = read_study(path, load_config(path, overrides))
    keys = [override.partition("=")[0].removeprefix("--config.") for override in overrides]
    for variant, changes in study.variants.items():
        if taken := [key for key in keys if key in changes]:
            raise ValueError(f"--config.{taken[0]} cannot be set: variant {variant} of {study.name} sets it")
    return study


def read_study(path: str, config) -> Study:
    """Return the study of a config file `path[:argument]` whose base config is `config`.

    Raises ValueError, in one sentence, if the file has no sweep or an invalid one.
    """
    file = path.partition(":")[0]
    given = run_config_file(path, "sweep")
    if not isinstance(given, dict) or not {*_NEEDED} <= given.keys() <= {*_NEEDED, *_OPTIONAL}:
        needed, optional = ", ".join(_NEEDED), ", ".join(_OPTIONAL)
        raise ValueError(f"sweep() of {file} must return a dict with {needed}, and optionally {optional}")
    study = Study(name=Path(file).stem, config=config, **given)
    check_choice(f"baseline of {file}", study.baseline, tuple(study.variants))
    check_choice(f"figure of {file}", study.figure, FIGURES)
    for name in study.published:
        check_choice(f"published variant of {file}", name, tuple(study.variants))
    for name in study.variants:
        study.make_config(RunKey(0, name))
    return study


def hash_config(flat: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that identify a config; seed, name and paths do not count."""
    kept = {name: value for name, value in flat.items() if name not in (*FREE_KEYS, "seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def find_workdir(study: Study, workdir: str | None) -> Path:
    """Return the folder of a study, by default runs/ablations/NAME. Raises ValueError for a URL."""
    if workdir and "://" in workdir:
        raise ValueError(
            f"--workdir is {workdir}, and the processes of a study share its runs by file locks, which buckets do not "
            "have; valid: a folder on a disk"
        )
    return Path(workdir or f"runs/ablations/{study.name}")
