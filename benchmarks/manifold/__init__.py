"""The experiment behind linear bottlenecks: `python -m benchmarks.manifold`."""
