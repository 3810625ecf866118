"""Networks for other runtimes: the graph, its folded weights, and a writer for each file format.

Where to look:
  graph.py: the network as a typed list of operations; folding.py: their kernels and biases with batch norm inside.
  interpreter.py: the graph run in JAX, in float32; quantized.py: what an int8 network is.
  arithmetic.py, integer.py: int8 as LiteRT computes it; calibrate.py, quantize.py: from a float network to int8.
  tflite.py, tflite_metadata.py, onnx.py, stablehlo.py: the writers.
  web.py, web/, litertjs.py: the page for a browser and its runtime.
  export.py: from weights to a file, its contract (contract.py) and its report (report.py).
  runtime.py: files run by LiteRT, ONNX Runtime and JAX.
"""

EXPORT_FORMATS = ("tflite", "onnx", "stablehlo", "web")
QUANTIZATIONS = ("none", "int8", "float16")
