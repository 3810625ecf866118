"""The programs of a TPU and of a GPU have the operations that `programs.json` lists, and no others of their kinds."""

import json

import jax
import jax.numpy as jnp
import pytest
from programs import GOLDEN, NETWORKS, count_all

from mobilenet_jax.models.cpu_norm import normalise

EXPECTED = json.loads(GOLDEN.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", NETWORKS)
def test_accelerators_run_these_operations(name, platform):
    """After a change that is meant to change them, `python tests/models/programs.py` writes the file again."""
    assert count_all(platform, name) == EXPECTED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_on_accelerators_auto_is_plain(name):
    """The forms for a CPU leave nothing behind: convolutions, products and slices are the textbook's."""
    for program in ("train", "infer"):
        auto, plain = (EXPECTED[name][f"{lowering} {program}"] for lowering in ("auto", "plain"))
        for operation in auto.keys() | plain.keys():
            if operation not in ("reduce", "transpose", "concatenate"):
                assert auto.get(operation) == plain.get(operation), operation


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_batch_norm_on_accelerators_has_no_matrix_product(platform):
    x, channels = jnp.zeros((8, 4, 4, 6)), jnp.ones(6)

    def gradients(x, scale, bias):
        return jax.grad(lambda *arrays: normalise(*arrays, 1e-3, "relu6")[0].sum(), argnums=(0, 1, 2))(x, scale, bias)  # pyright: ignore[reportIndexIssue]

    traced = jax.jit(gradients).trace(x, channels, channels)
    assert "dot_general" not in traced.lower(lowering_platforms=(platform,)).as_text()
    assert "dot_general" in traced.lower(lowering_platforms=("cpu",)).as_text()
