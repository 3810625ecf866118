"""Count the operations of the programs that a TPU and a GPU get: `python tests/models/programs.py` writes the file.

Run it after a change that is meant to change these programs, and read the difference that git shows.
"""

import collections
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.zoo import make_spec

GOLDEN = Path(__file__).parent / "programs.json"
# One network of each family, with the blocks that are kept: one of each kind that it has.
NETWORKS = {
    "mobilenet_v1": (0, 1),
    "mobilenet_v2": (0, 1, 2),
    "mobilenet_v3_small": (0, 1, 3),
    "mobilenet_v4_conv_small": (0, 4, 5),
    "mobilenet_v4_hybrid_medium": (0, 2, 11, 12),
    "mobilenet_edgetpu_100": (0, 1, 5),
}
# These cost time. What is not here is elementwise, or says how an array is shaped.
OPERATIONS = (
    "concatenate",
    "convolution",
    "custom_call",
    "dot_general",
    "gather",
    "pad",
    "reduce",
    "reduce_window",
    "scatter",
    "select_and_scatter",
    "slice",
    "transpose",
)


def make_network(name: str, lowering: str) -> MobileNet:
    """Return a narrow network of a few blocks."""
    spec = make_spec(name, width=0.25, num_classes=10, dropout=0.0)
    return MobileNet(replace(spec, blocks=tuple(spec.blocks[i] for i in NETWORKS[name])), lowering=lowering)


def count_operations(model: MobileNet, platform: str, *, train: bool) -> dict[str, int]:
    """Count the OPERATIONS of inference, or of the loss with its gradient, as JAX lowers them for a platform."""
    variables = jax.eval_shape(functools.partial(init_variables, model, seed=0))
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)

    def gradients(variables, images):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits), updated

        return jax.grad(loss, has_aux=True)(variables["params"])

    program = jax.jit(gradients if train else functools.partial(model.apply, train=False))
    lowered: Any = program.trace(variables, images).lower(lowering_platforms=(platform,))
    functions = {f.name.value: f for f in lowered.compiler_ir("stablehlo").body.operations}
    counts = _count_calls(functions, "main")
    return {name: counts[f"stablehlo.{name}"] for name in OPERATIONS if counts[f"stablehlo.{name}"]}


def _count_calls(functions: dict[str, Any], name: str) -> collections.Counter:
    """Count the operations that a call of a function runs; JAX shares functions between layers of equal shapes."""

    def walk(operation) -> collections.Counter:
        counts = collections.Counter([operation.operation.name])
        if operation.operation.name == "func.call":
            counts += _count_calls(functions, operation.attributes["callee"].value)
        for region in operation.regions:
            for block in region:
                for inner in block:
                    counts += walk(inner)
        return counts

    return walk(functions[name])


def count_all(platform: str, name: str) -> dict[str, dict[str, int]]:
    """Return the counts of both lowerings of a network, in training and inference."""
    return {
        f"{lowering} {'train' if train else 'infer'}": count_operations(
            make_network(name, lowering), platform, train=train
        )
        for lowering in ("auto", "plain")
        for train in (True, False)
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    lines = [f" {json.dumps(name)}: {json.dumps(count_all('tpu', name))}" for name in NETWORKS]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
