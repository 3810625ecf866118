"""Training: from a config to a result."""
