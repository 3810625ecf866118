"""Networks for other runtimes: the graph, its folded weights, and a writer for each file format.

Where to look:
  graph.py: the network as a typed list of operations; folding.py: their kernels and biases with batch norm inside.
  interpreter.py: the graph run in JAX, in float32; quantized.py: what an int8 network is.
"""
