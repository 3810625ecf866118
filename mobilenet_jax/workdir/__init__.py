"""The files of a run: checkpoints, metrics, environment."""
