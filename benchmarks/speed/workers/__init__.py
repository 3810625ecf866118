"""Workers: each file is one side of a benchmark and runs in that side's Python. Only ours import `mobilenet_jax`."""
