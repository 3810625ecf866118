"""LiteRT beside the simulation of int8 networks."""

from collections.abc import Mapping

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from mobilenet_jax.exporting.folding import Weights
from mobilenet_jax.exporting.graph import Graph
from mobilenet_jax.exporting.integer import encode, list_ranges
from mobilenet_jax.exporting.quantized import Quantized, as_float
from mobilenet_jax.exporting.tflite import write_tflite


def run_file(data: bytes, inputs: np.ndarray, *, keep: bool = False) -> dict[str, np.ndarray]:
    """Return the output of a file of any batch size as "output"; with `keep`, every float tensor by its name."""
    kernels = OpResolverType.BUILTIN_REF if keep else OpResolverType.AUTO  # the fast kernels keep nothing
    interpreter = Interpreter(
        model_content=data,
        num_threads=1,
        experimental_preserve_all_tensors=keep,
        experimental_op_resolver_type=kernels,
    )
    given, returned = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(given["index"], inputs.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], inputs)
    interpreter.invoke()
    found = {"output": interpreter.get_tensor(returned["index"])}
    for tensor in interpreter.get_tensor_details() if keep else ():
        if tensor["dtype"] is np.float32:
            found[tensor["name"]] = interpreter.get_tensor(tensor["index"])
    return found


def run_litert(network: Quantized, inputs: np.ndarray) -> np.ndarray:
    """Return the int8 codes that LiteRT computes of float inputs."""
    codes = encode(inputs, network.tensors[network.graph.input])
    return run_file(write_tflite(network, batch=None), codes)["output"]


def measure_extremes(graph: Graph, weights: Mapping[str, Weights], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Return the ranges of a float network, run by LiteRT: compiling it with XLA would take seconds."""
    tensors = run_file(write_tflite(as_float(graph, weights), batch=None), inputs, keep=True)
    return {name: np.array([tensors[name].min(), tensors[name].max()]) for name in list_ranges(graph)}
