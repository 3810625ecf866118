import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mobilenet_jax.figures import draw_confusion, draw_curves


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look at what they hold."""
    saved = []
    save = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


METRICS = [
    {"step": 1, "epoch": 0.5, "train/loss": 2.0, "train/top1": 0.1},
    {"step": 2, "epoch": 1.0, "train/loss": 1.0, "train/top1": 0.6, "eval/loss": 1.5, "eval/top1": 0.5},
    {"step": 3, "epoch": 1.5, "train/loss": None, "train/top1": 0.8},
    {"step": 4, "epoch": 2.0, "eval/loss": 0.25, "eval/top1": 0.9875, "eval_ema/top1": 0.9},
    {"step": 5, "train/loss": 0.5},
]


def _curves(axes):
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
