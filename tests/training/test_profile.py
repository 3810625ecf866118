import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mobilenet_jax.training.profile import Profiler


def read_steps(folder: Path) -> list[int]:
    """Return the numbers of the training steps in the Perfetto trace below a folder."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({int(event["args"]["step_num"]) for event in events if event.get("name") == "train"})


@pytest.mark.parametrize(("steps", "run", "traced"), [((2, 3), 5, [2, 3]), ((4, 9), 5, [4, 5])])
def test_the_wanted_steps_are_traced_also_where_the_run_ends_before(tmp_path, steps, run, traced):
    step, state = jax.jit(lambda state: state + 1), jnp.zeros(())
    with Profiler(steps, tmp_path) as profiler:
        for number in range(1, run + 1):
            with profiler.step(number, state):
                state = step(state)
    assert read_steps(tmp_path) == traced
    assert list(tmp_path.rglob("*.xplane.pb"))  # TensorBoard reads this one


def test_a_run_resumed_behind_the_wanted_steps_traces_nothing(tmp_path):
    with Profiler((2, 3), tmp_path / "profile") as profiler, profiler.step(7, jnp.zeros(())):
        pass
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [(0, 3), (3, 2)])
def test_impossible_steps_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=r"--profile is \d:\d; valid: START:STOP"):
        Profiler(steps, tmp_path)
