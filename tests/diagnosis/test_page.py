import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_report import METRICS, make_weights

from mobilenet_jax.diagnosis.page import draw_page, tile_filters
from mobilenet_jax.diagnosis.report import make_report
from mobilenet_jax.models.folded import list_layers


def test_filters_are_tiled_row_by_row_each_by_its_largest_weight():
    filters = np.zeros((3, 3, 3))
    filters[..., 0], filters[1, 1, 1], filters[0, 2, 2] = 5, -2, 0.1
    grid = tile_filters(filters, columns=2)
    assert grid.shape == (9, 9)
    np.testing.assert_array_equal(grid[1:4, 1:4], np.ones((3, 3)))
    assert grid[2, 6] == -1
    assert grid[5, 3] == 1
    assert np.isnan(grid[[0, 4, 8]]).all()
    assert np.isnan(grid[5:8, 5:]).all()  # no fourth filter


@pytest.mark.parametrize("metrics", [(), METRICS])
def test_page_draws_filters_and_frames_the_dead(tiny, tmp_path, monkeypatch, metrics):
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    weights = make_weights(tiny, params__block_00__depthwise__conv__kernel=((..., [3, 23]), 0))
    layers = list(list_layers(weights[0].spec, weights[1]))
    draw_page(make_report(weights, metrics=metrics), layers, tmp_path / "page.png")
    titles = [axes.get_title(loc="left") for axes in saved[0].axes]
    assert titles[:3] == [
        "block_00/depthwise: 24 filters, 2 dead",
        "block_01/depthwise: 32 filters, 0 dead",
        "block_02/depthwise: 12 filters, 0 dead",
    ]
    assert [len(axes.patches) for axes in saved[0].axes[:3]] == [2, 0, 0]
    assert ("Gradient norm before clipping" in titles) == bool(metrics)
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1920, 1488)
