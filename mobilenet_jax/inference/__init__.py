"""Class names and probabilities of images."""
