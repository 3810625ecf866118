"""The files of a run: checkpoints, metrics and environment, and the atomic writing of files."""
