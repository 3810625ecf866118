"""Images from storage to batches of uint8, without TensorFlow."""
