"""Our training, inference, input and start-up beside other frameworks: `python -m benchmarks.speed`."""
