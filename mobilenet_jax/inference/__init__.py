"""Class names and probabilities for images."""
