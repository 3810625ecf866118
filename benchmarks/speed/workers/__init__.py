"""One side of a benchmark each, run as a file by that side's own Python; `mobilenet_jax` is ours' alone to import."""
