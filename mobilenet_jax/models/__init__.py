"""Architectures: tables of rows, the network that walks them, and its cost.

Where to look:
  v1.py v2.py v3.py v4.py edgetpu.py: the papers' tables and width rules; zoo.py: their names.
  spec.py: the rows of the tables and the network they form; ops.py: the layers of a row, with their shapes.
  options.py: changes that apply to any network; spec_json.py: a network as JSON.
  network.py, blocks.py, layers.py, attention.py, activations.py: the modules, in Flax.
  cpu.py: the fast forms of convolution and batch norm, and which of them a TPU runs.
  cost.py: parameters, multiply-adds and memory by arithmetic; init.py: initial values; folded.py: kernels with
  the batch norm behind them.
"""
