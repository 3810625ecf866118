import json
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from mobilenet_jax.training.agree import check_agreement, find_differences


def agree_as_two(monkeypatch, first: dict, second: dict) -> None:
    """Call `check_agreement` as each of two processes; it must say the same on both."""
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda row: sent.append(row) or np.stack([row, row]))
    for facts in (first, second):
        check_agreement(facts)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda row: np.stack(sent))
    check_agreement(first)


def test_equal_facts_agree(monkeypatch):
    facts: dict[str, Any] = {"seed": 0, "class names": [f"class {i}" for i in range(1000)], "path": None}
    agree_as_two(monkeypatch, facts, dict(reversed(facts.items())))


def test_long_values_are_compared_to_the_last_letter(monkeypatch):
    names = [f"class {i}" for i in range(1000)]
    with pytest.raises(ValueError, match=r"^the processes differ: class names is .* on process 0 and .* on process 1"):
        agree_as_two(monkeypatch, {"class names": names}, {"class names": [*names[:-1], "another"]})


def test_more_facts_than_fit_are_still_compared(monkeypatch):
    rng = np.random.default_rng(0)
    facts = {f"key {i}": rng.bytes(20).hex() for i in range(3000)}
    agree_as_two(monkeypatch, facts, facts)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the processes differ: facts is "):
        agree_as_two(monkeypatch, facts, {**facts, "key 0": ""})


def test_a_difference_names_the_fact_and_the_processes():
    gathered = [{"seed": json.dumps(i // 9), "same": "1"} for i in range(10)] + [{"same": "1"}]
    assert find_differences(gathered) == [
        "seed is 0 on processes 0, 1, 2, 3, 4, 5, 6, 7 and 1 more and 1 on process 9 and absent on process 10"
    ]
    assert find_differences(gathered[:9]) == []


def test_a_single_process_gathers_nothing(monkeypatch):
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda _: pytest.fail("gathered"))
    check_agreement({"seed": 0})
