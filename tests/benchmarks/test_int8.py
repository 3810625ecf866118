import numpy as np
import pytest

from benchmarks.int8 import describe, read_labelled


def test_a_row_has_the_error_over_the_scale_and_counts_answers():
    wanted = np.array([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    got = wanted + np.array([[0.1, -0.1], [-1.5, 1.5], [0.1, -0.1]])
    error = np.sqrt((4 * 0.01 + 2 * 2.25) / 6)  # the scale, the standard deviation of the logits, is 1
    row = describe("int8", b"x" * 20_000, got, wanted, np.array([1, 0, 0]))
    assert row == f"| int8 | 0.02 | {error:.3f} | 2 of 3 | 33.33 |"


@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
def test_images_of_a_config_are_its_evaluation_images_with_labels():
    card = {"preprocessing": {"image_size": 16, "crop_share": 1.0, "interpolation": "bilinear", "squash": False}}
    found = read_labelled("configs/v1.py:digits", card, count=100)
    assert found.pixels.shape == (100, 16, 16, 3)
    assert found.labels is not None
    assert set(found.labels.tolist()) == set(range(10))
    assert len(read_labelled("configs/v1.py:digits", card, count=10_000).pixels) == 360
