import numpy as np
import pytest
from PIL import Image

from mobilenet_jax.plots import draw_confusion, draw_curves, draw_frontier, draw_variants, make_figure, save, style_axes

METRICS = [
    {"step": 1, "epoch": 0.5, "train/loss": 2.0, "train/top1": 0.1},
    {"step": 2, "epoch": 1.0, "train/loss": 1.0, "train/top1": 0.6, "eval/loss": 1.5, "eval/top1": 0.5},
    {"step": 3, "epoch": 1.5, "train/loss": None, "train/top1": 0.8},
    {"step": 4, "epoch": 2.0, "eval/loss": 0.25, "eval/top1": 0.9875, "eval_ema/top1": 0.9},
    {"step": 5, "train/loss": 0.5},
]


def test_style_sets_what_it_is_given_and_keeps_the_rest(tmp_path):
    figure, (left, right) = make_figure(4, 2, ncols=2)
    right.set_xlabel("kept")
    style_axes(left, x_label="epoch", y_label="top-1", title="a run", percent="y")
    style_axes(right)
    assert (left.get_xlabel(), left.get_ylabel(), left.get_title()) == ("epoch", "top-1", "a run")
    assert left.yaxis.get_major_formatter()(0.25) == "25%"
    assert right.get_xlabel() == "kept"
    assert not any(axes.spines[side].get_visible() for axes in (left, right) for side in ("top", "right"))
    save(figure, tmp_path / "figure.png.tmp")
    with Image.open(tmp_path / "figure.png.tmp") as image:
        assert (image.format, image.size) == ("PNG", (480, 240))
    with pytest.raises(ValueError, match="percent is 'z'; valid: x, y, None"):
        style_axes(left, percent="z")


def _curves(axes):
    """The points of each labelled line."""
    return {
        line.get_label(): line.get_xydata().tolist()
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_curves_hold_the_metrics_by_epoch_and_the_last_values(tmp_path, figures):
    draw_curves(METRICS, tmp_path / "curves.png", title="a run")
    loss, accuracy = figures[0].axes
    assert _curves(loss) == {
        "train: 1.0000": [[0.5, 2.0], [1.0, 1.0]],
        "evaluation: 0.2500": [[1.0, 1.5], [2.0, 0.25]],
    }
    assert _curves(accuracy) == {
        "train: 80.00%": [[0.5, 0.1], [1.0, 0.6], [1.5, 0.8]],
        "evaluation: 98.75%": [[1.0, 0.5], [2.0, 0.9875]],
        "evaluation, EMA: 90.00%": [[2.0, 0.9]],
    }
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 480)


@pytest.mark.parametrize("lines", [[], [{"step": 1, "epoch": 1.0}], [{"epoch": 1.0, "train/loss": None}]])
def test_no_curve_at_all_is_an_error(tmp_path, lines):
    with pytest.raises(ValueError, match=r"curves\.png: no curves"):
        draw_curves(lines, tmp_path / "curves.png", title="a run")


def test_confusion_prints_counts_colours_row_shares_and_titles_the_accuracy(tmp_path, figures):
    matrix = np.array([[8, 2, 0], [0, 1000, 0], [0, 0, 0]])
    draw_confusion(matrix, ["cat", "dog", "emu"], tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert axes.get_title() == "accuracy 99.80% (1,008 of 1,010)"
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "8",
        (1, 0): "2",
        (1, 1): "1,000",
    }
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog", "emu"]


def test_confusion_of_many_classes_has_no_counts(tmp_path, figures):
    draw_confusion(np.eye(100, dtype=int), [f"class {i}" for i in range(100)], tmp_path / "confusion.png")
    assert not figures[0].axes[0].texts


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(101), "101 classes are too many"),
        (np.ones((2, 3)), r"shape \(2, 3\)"),
        (np.zeros((2, 2)), "sum 0"),
    ],
)
def test_matrix_that_cannot_be_drawn_is_refused(tmp_path, matrix, message):
    with pytest.raises(ValueError, match=message):
        draw_confusion(matrix, [str(i) for i in range(len(matrix))], tmp_path / "confusion.png")
    assert not list(tmp_path.iterdir())


ESTIMATES = {"wide": ([90.0, 92.0], 91.0, 1.5), "narrow": ([85.0], 85.0, float("nan"))}


def _bars(axes):
    """For each error bar: the point of the mean, and the two ends of its interval."""
    found = []
    for container in axes.containers:
        (mean, _, lines) = container.lines
        ends = [segment.tolist() for line in lines for segment in line.get_segments()]
        found += [(tuple(place), ends[i] if ends else None) for i, place in enumerate(mean.get_xydata().tolist())]
    return found


def test_variants_have_means_intervals_runs_and_curves_in_order(tmp_path, figures):
    curves = {"wide": [[(1, 0.5), (2, 0.9)], [(1, 0.7), (2, 0.92)]], "narrow": [[(1, 0.4), (2, 0.85)]]}
    draw_variants(ESTIMATES, curves, "wide", tmp_path / "figure.png", title="a study")
    axes, curve_axes = figures[0].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["wide (base)", "narrow"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert _bars(axes) == [((91.0, 0.0), [[89.5, 0.0], [92.5, 0.0]]), ((85.0, 1.0), None)]
    dots = [line.get_xdata() for line in axes.get_lines() if line.get_markersize() == 3.5]
    assert [list(values) for values in dots] == [[90.0, 92.0], [85.0]]
    assert [text.get_text() for text in axes.texts] == ["91.00", "85.00"]
    assert _curves(curve_axes) == {"wide": [[1.0, 60.0], [2.0, 91.0]], "narrow": [[1.0, 40.0], [2.0, 85.0]]}
    single = [list(line.get_ydata()) for line in curve_axes.get_lines() if line.get_linewidth() == 0.8]
    assert single == [[50.0, 90.0], [70.0, 92.0], [40.0, 85.0]]


def test_intervals_beyond_what_an_accuracy_can_be_do_not_set_the_axis(tmp_path, figures):
    estimates = {"wide": ([60.0, 90.0], 75.0, 190.6)}
    draw_variants(estimates, {"wide": [[(1, 0.6)], [(1, 0.9)]]}, "wide", tmp_path / "points.png", title="a study")
    draw_frontier(estimates, {"wide": 10}, {"": ["wide"]}, tmp_path / "frontier.png", title="a study")
    assert figures[0].axes[0].get_xlim() == figures[1].axes[0].get_ylim() == (0, 100)


def test_frontier_joins_each_line_by_multiply_adds(tmp_path, figures):
    estimates = {**ESTIMATES, "small": ([80.0, 82.0], 81.0, 2.0)}
    madds = {"wide": 4000, "narrow": 1000, "small": 2000, "absent": 1}
    lines = {"32 px": ["wide", "narrow", "absent"], "16 px": ["small"], "8 px": ["absent"]}
    draw_frontier(estimates, madds, lines, tmp_path / "figure.png", title="a study")
    (axes,) = figures[0].axes
    assert axes.get_xscale() == "log"
    assert [place for place, _ in _bars(axes)] == [(1000.0, 85.0), (4000.0, 91.0), (2000.0, 81.0)]
    assert [ends for _, ends in _bars(axes)][1:] == [[[4000, 89.5], [4000, 92.5]], [[2000, 79.0], [2000, 83.0]]]
    assert {text.get_text() for text in axes.texts} == {"wide", "narrow", "small"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["32 px", "16 px"]
