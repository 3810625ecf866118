"""The agreement of all processes on what they are about to train."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mobilenet_jax.training.build import Setup
from mobilenet_jax.workdir.environment import find_versions

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "mobilenet_jax")
_BYTES = 2**15  # of a process's facts, compressed
_SHOWN = 60  # longer values are compared by their digest
_LISTED = 8
# Where and how a host reads its copy of the data; this does not change the training.
_OWN = ("data.path", "data.data_dir", "data.workers")


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ValueError, on every process and in one sentence, unless all processes have the same facts.

    Every process must call this at the same point. The sentence names the facts that differ and the processes that have
    each value. A single process agrees with itself at no cost.

    Args:
      facts: {name: value that JSON can hold}; the names may differ between processes too.
    """
    if jax.process_count() == 1:
        return
    short = {name: _shorten(value) for name, value in facts.items()}
    packed = zlib.compress(json.dumps(short).encode())
    padded = np.zeros(_BYTES, np.uint8)
    if len(packed) > _BYTES:
        # Raising here would leave the other processes waiting. A digest of all facts still shows a difference.
        packed = zlib.compress(json.dumps({"facts": _shorten(json.dumps(short))}).encode())
    padded[: len(packed)] = np.frombuffer(packed, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    gathered = [json.loads(zlib.decompressobj().decompress(row.tobytes())) for row in rows]
    if differences := find_differences(gathered):
        more = f"; and {len(differences) - _LISTED} more differences" if len(differences) > _LISTED else ""
        raise ValueError(
            f"the processes differ: {'; '.join(differences[:_LISTED])}{more}; start the same command, with the same "
            "packages and the same data, on every host"
        )


def describe_facts(setup: Setup) -> dict[str, Any]:
    """Return the facts of a run that all processes must share before they touch its workdir."""
    return {
        **{f"config.{key}": value for key, value in setup.flat_config.items() if key not in _OWN},
        "evaluation images": setup.info.eval_count,
        "class names": list(setup.info.class_names),
        **{f"version of {name}": version for name, version in find_versions(PACKAGES).items()},
    }


def find_differences(gathered: list[dict[str, str]]) -> list[str]:
    """Return "seed is 0 on process 0 and 1 on process 1" for each fact that differs; item i is of process i."""
    found = []
    for name in sorted({name for facts in gathered for name in facts}):
        holders: dict[str, list[int]] = {}
        for process, facts in enumerate(gathered):
            holders.setdefault(facts.get(name, "absent"), []).append(process)
        if len(holders) > 1:
            found.append(f"{name} is {' and '.join(f'{v} on {_list(p)}' for v, p in holders.items())}")
    return found


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:20]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _list(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:_LISTED]))
    rest = f" and {len(processes) - _LISTED} more" if len(processes) > _LISTED else ""
    return f"process{'es' if len(processes) > 1 else ''} {shown}{rest}"
