"""Our step, start and input against those of the peers that are installed: `python -m benchmarks.speed`."""
