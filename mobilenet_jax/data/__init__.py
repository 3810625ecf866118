"""Images from storage to batches of uint8, without TensorFlow."""

DECODES = ("exact", "fast")  # of JPEGs: all pixels, or fewer where many are left for the resize
CACHES = ("", "resized")  # of training images, in memory
