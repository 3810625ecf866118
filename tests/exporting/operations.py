"""The operations of a model's TFLite file, without its weights.

python -m tests.exporting.operations > tests/exporting/operations.json   writes the golden table again
"""

import json
from collections import Counter

import numpy as np

from mobilenet_jax.exporting import tflite
from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import build_graph
from mobilenet_jax.exporting.quantized import as_float
from mobilenet_jax.models.spec import Spec
from mobilenet_jax.models.zoo import MODELS, make_spec

SIZE = 224
CONVENTIONS = ("keras", "torchvision")  # TensorFlow's padding and PyTorch's


class _Drawing(tflite._Writer):
    """A writer that leaves the data out."""

    def _constant(self, name, data, scale=None):
        return self._tensor(name, data.shape, data.dtype.name, scale=scale)


def count_operations(spec: Spec) -> dict[str, int]:
    """The number of operations of each type, sorted by type."""
    graph, zero = build_graph(spec, SIZE), np.float32(0)
    weights = {
        layer.name: Weights(np.broadcast_to(zero, layer.kernel_shape), np.broadcast_to(zero, layer.kernel_shape[-1:]))
        for layer in graph.layers()
    }
    writer = _Drawing(as_float(graph, weights), batch=1, float16=False, float_ends=False)
    writer.write({})
    names = [operator for operator, _ in writer.codes]
    return dict(sorted(Counter(names[operation.opcodeIndex] for operation in writer.operators).items()))


def count_all() -> dict[str, dict[str, int]]:
    """The operations of every model by "name, convention"."""
    found = {}
    for name in MODELS:
        for convention in CONVENTIONS:
            try:
                spec = make_spec(name, convention=convention)
            except ValueError:  # the framework has no such model
                continue
            found[f"{name}, {convention}"] = count_operations(spec)
    return found


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in count_all().items()]
    print("{\n" + ",\n".join(lines) + "\n}")
