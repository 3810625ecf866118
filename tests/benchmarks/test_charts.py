import numpy as np
import pytest
from PIL import Image

from benchmarks.speed.charts import draw_all, format_table, list_resolutions


def make_result(group="train", *, resolution=224, rate=10.0, ratios=None, **fields) -> dict:
    side = {"about": {}, "seconds": [16 / rate], "images_per_second": rate}
    return {
        "group": group,
        "what": "train",
        "name": "mobilenet_v2",
        "width": 1.0,
        "resolution": resolution,
        "batch_size": 16,
        "devices": 1,
        "madds": 1000 * resolution**2,
        "sides": {"ours": side},
        "ratios": ratios or {},
        **fields,
    }


STARTUP = {"group": "startup", "what": "startup", "name": "mobilenet_v2", "sides": {"cold": {"seconds": [9.0]}}}
RATIOS = {"torch": {"median": 0.75, "min": 0.5, "max": 1.5}, "keras": {"median": 12.0, "min": 11.0, "max": 14.0}}


def test_bars_show_medians_and_lines_show_the_range(tmp_path, figures):
    results = [STARTUP, make_result(ratios=RATIOS), make_result("scaling", ratios=RATIOS)]
    assert draw_all(results, tmp_path) == [tmp_path / "ratios.png"]
    axes = figures[0].axes[0]
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches] == [(1, 0.75), (1, 12)]
    ranges = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ranges == [[0.5, 1.5], [11.0, 14.0]]
    labels = ["train v2, 224 px, batch 16: torch", "train v2, 224 px, batch 16: keras"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == labels
    with Image.open(tmp_path / "ratios.png") as image:
        assert (image.format, image.width) == ("PNG", 1080)


def test_our_loader_with_other_keys_has_columns_and_bars(tmp_path):
    ratios = {side: {"median": 0.5, "min": 0.4, "max": 0.6} for side in ("ours_fast", "ours_resized")}
    result = make_result("input", ratios=ratios)
    result["sides"] |= {side: {"images_per_second": 20.0} for side in ratios}
    assert "| ours | ours_fast | ours_resized |" in format_table([result])
    assert draw_all([result], tmp_path) == [tmp_path / "ratios.png"]


def test_curve_is_cost_against_resolution_beside_the_prediction_by_multiply_adds(tmp_path, figures):
    results = [make_result("scaling", resolution=size, rate=rate) for size, rate in ((224, 10), (112, 20), (56, 50))]
    assert draw_all(results, tmp_path) == [tmp_path / "resolution.png"]
    measured, predicted = figures[0].axes[0].get_lines()
    assert measured.get_label() == "v2, ours"
    np.testing.assert_allclose(measured.get_xydata(), [[56, 20], [112, 50], [224, 100]])
    np.testing.assert_allclose(predicted.get_xydata(), [[56, 100 / 16], [112, 25], [224, 100]])


def test_points_that_differ_in_another_key_are_on_no_curve():
    base = make_result("scaling")
    others = [make_result("scaling", resolution=128, **{key: 4}) for key in ("width", "batch_size", "devices")]
    assert list_resolutions([base, *others]) == {}
    smaller = make_result("scaling", resolution=128, rate=40.0)
    expected = [(128, 25.0, 1000 * 128**2), (224, 100.0, 1000 * 224**2)]
    assert list_resolutions([base, *others, smaller]) == {("mobilenet_v2", "ours"): expected}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to draw"):
        draw_all([STARTUP, make_result()], tmp_path)


def test_a_row_of_the_table_has_both_rates_and_their_ratio():
    timed = make_result(rate=20.0, ratios={"torch": {"median": 2.0, "min": 1.5, "max": 2.5}})
    timed["sides"]["torch"] = {"about": {}, "seconds": [1.6], "images_per_second": 10.0}
    head, _, row = format_table([timed, STARTUP]).splitlines()
    assert head == "| case | ours | torch |"
    assert row == "| train v2, 224 px, batch 16 | 20 | 10: 2.00x (1.50-2.50) |"
