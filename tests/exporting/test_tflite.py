"""TFLite files compute what the network computes, with the operations that a person would have drawn."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from flatbuffers import number_types
from flatbuffers.table import Table

from mobilenet_jax.exporting import tflite_metadata
from mobilenet_jax.exporting.folding import read_weights
from mobilenet_jax.exporting.graph import build_graph, with_normalisation
from mobilenet_jax.exporting.quantized import as_float
from mobilenet_jax.exporting.tflite import write_tflite
from mobilenet_jax.models.zoo import make_spec
from tests.exporting.networks import SIZE, SPECS
from tests.exporting.operations import count_all, count_operations


def run(data: bytes, images: np.ndarray) -> tuple[np.ndarray, Counter]:
    """The outputs of a file for images, and the numbers of its operations."""
    interpreter = Interpreter(model_content=data, num_threads=1)
    (given,), (returned,) = interpreter.get_input_details(), interpreter.get_output_details()
    if given["shape_signature"][0] == -1:
        interpreter.resize_tensor_input(given["index"], images.shape, strict=True)
    interpreter.allocate_tensors()
    outputs = []
    for part in np.split(images, len(images) // interpreter.get_input_details()[0]["shape"][0]):
        interpreter.set_tensor(given["index"], part)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(returned["index"]))
    return np.concatenate(outputs), Counter(op["op_name"] for op in interpreter._get_ops_details())


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest number."""
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in SPECS), ("attention", 3), ("attention", None)])
def test_a_float_file_computes_what_the_network_computes(networks, name, batch):
    spec, variables, images, logits = networks[name]
    graph = build_graph(spec, SIZE)
    got, operations = run(write_tflite(as_float(graph, read_weights(graph, variables)), batch=batch), images)
    assert difference(got, logits) < 2e-6
    assert operations["DELEGATE"] == 1


def test_kernels_in_float16_are_the_rounded_kernels_and_half_the_size(networks):
    spec, variables, images, _ = networks["gates"]
    graph = build_graph(spec, SIZE)
    weights = read_weights(graph, variables)
    rounded = {
        name: pair._replace(kernel=pair.kernel.astype(np.float16).astype(np.float32)) for name, pair in weights.items()
    }
    wide, narrow = write_tflite(as_float(graph, rounded)), write_tflite(as_float(graph, weights), float16=True)
    wanted, _ = run(wide, images)
    got, operations = run(narrow, images)
    assert difference(got, wanted) < 1e-6
    assert operations["DELEGATE"] == 1
    kernels = sum(pair.kernel.nbytes for pair in weights.values())
    assert len(wide) - len(narrow) > 0.25 * kernels


def test_pixels_are_normalised_inside_the_file(networks):
    spec, variables, _, _ = networks["gates"]
    mean, std = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    pixels = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    graph = build_graph(spec, SIZE)
    plain = as_float(graph, read_weights(graph, variables))
    wanted, _ = run(write_tflite(plain), ((pixels - np.array(mean)) / np.array(std)).astype(np.float32))
    graph = with_normalisation(graph, mean, std)
    got, operations = run(write_tflite(as_float(graph, read_weights(graph, variables))), pixels)
    assert difference(got, wanted) < 2e-6
    assert operations["DELEGATE"] == 1


def test_every_model_has_the_operations_of_the_golden_table():
    golden = json.loads((Path(__file__).parent / "operations.json").read_text())
    found = count_all()
    assert {name: counts for name, counts in found.items() if counts != golden.get(name)} == {}
    assert found.keys() == golden.keys()


def test_v2_of_torchvision_has_the_operations_that_its_table_has():
    # 1801.04381 Table 2: 17 blocks, 16 of which expand; 10 residuals; PyTorch pads the five strides of 2 another way.
    assert count_operations(make_spec("mobilenet_v2", convention="torchvision")) == {
        "ADD": 10,
        "CONV_2D": 1 + 16 + 17 + 1,
        "DEPTHWISE_CONV_2D": 17,
        "FULLY_CONNECTED": 1,
        "MEAN": 1,
        "PAD": 5,
    }


def test_the_metadata_is_what_task_libraries_read():
    data = tflite_metadata.pack_metadata(
        name="a name",
        description="what it is",
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
        takes_pixels=False,
        has_labels=True,
    )
    assert data[4:8] == b"M001"
    model = Table(data, int.from_bytes(data[:4], "little"))
    assert (read_text(model, 0), read_text(model, 1), read_text(model, 7)) == ("a name", "what it is", "1.0.0")
    subgraph = read_table(model, 3, 0)
    image, logits = read_table(subgraph, 2, 0), read_table(subgraph, 3, 0)
    content, unit = read_table(image, 3), read_table(image, 4, 0)
    assert content.Get(number_types.Uint8Flags, content.Offset(4) + content.Pos) == 2  # ImageProperties
    assert unit.Get(number_types.Uint8Flags, unit.Offset(4) + unit.Pos) == 1  # NormalizationOptions
    options = read_table(unit, 1)
    assert [read_floats(options, slot) for slot in (0, 1)] == [[1, 2, 3], [4, 5, 6]]
    labels = read_table(logits, 6, 0)
    assert read_text(labels, 0) == "labels.txt"
    assert labels.Get(number_types.Int8Flags, labels.Offset(8) + labels.Pos) == 2  # TENSOR_AXIS_LABELS


def read_table(table: Table, slot: int, index: int | None = None) -> Table:
    """The table in a field, or in the vector in a field."""
    offset = table.Offset(4 + 2 * slot)
    place = table.Pos + offset if index is None else table.Vector(offset) + 4 * index
    return Table(table.Bytes, table.Indirect(place))


def read_text(table: Table, slot: int) -> str:
    """The text in a field."""
    return table.String(table.Pos + table.Offset(4 + 2 * slot)).decode()


def read_floats(table: Table, slot: int) -> list[float]:
    """The numbers in a field."""
    offset = table.Offset(4 + 2 * slot)
    places = [table.Vector(offset) + 4 * i for i in range(table.VectorLen(offset))]
    return [table.Get(number_types.Float32Flags, place) for place in places]
