import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.manifold.__main__ import main
from benchmarks.manifold.experiment import (
    DIMENSIONS,
    MEASURES,
    draw_embedding,
    embed,
    expect,
    make_spiral,
    measure,
    project_back,
    run_study,
)


@pytest.fixture(scope="module")
def study() -> dict[int, dict]:
    code = "import json; from benchmarks.manifold.experiment import run_study; print(json.dumps(run_study(400)))"
    # Threads slow small matrices down, and NumPy reads their number when it is imported.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return {row["dimensions"]: row for row in json.loads(done.stdout)}


def test_spiral_is_evenly_spaced_and_winds_twice():
    points = make_spiral()
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)[50:]
    assert steps.max() / steps.min() < 1.3
    assert np.linalg.norm(points[-1]) == pytest.approx(1)
    turns = np.unwrap(np.arctan2(points[:, 1], points[:, 0]))
    assert turns[-1] - turns[0] == pytest.approx(4 * np.pi, rel=0.05)


def test_a_map_and_its_mirror_lose_nothing():
    # x = relu(x) - relu(-x): both coordinates are kept, and T^+ returns half of each.
    points = make_spiral()
    embedding = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    np.testing.assert_allclose(project_back(points, embedding), points / 2, atol=1e-12)
    found = measure(points, embedding)
    assert found["error_pseudo_inverse"] == pytest.approx(0.25)
    assert found["error_linear"] == pytest.approx(0, abs=1e-20)
    axis = np.mean(np.any(np.abs(points) == 0, axis=1))  # points on an axis have one active unit
    assert found["unrecoverable"] == pytest.approx(axis)
    assert found["area"] == pytest.approx(0.5, abs=0.01)  # 1, where the Gram determinant without ReLU is 2


def test_the_loss_of_a_half_plane_is_counted_by_hand():
    # Both rows are active only in the right half-plane, except for two slivers.
    embedding = np.array([[1.0, 1e-9], [1.0, -1e-9]])
    points = make_spiral()
    left = points[:, 0] < 0
    found = measure(points, embedding)
    assert found["unrecoverable"] == pytest.approx(left.mean())
    assert found["rank"] == pytest.approx(2 * (1 - left.mean()))
    assert found["collapsed_pairs"] == pytest.approx(np.mean(left[1:] & left[:-1]))
    assert found["maps_with_loss"] == 1
    assert (embed(points, embedding)[left] == 0).all()


@pytest.mark.parametrize("n", DIMENSIONS)
def test_measured_shares_agree_with_the_formulas(study, n):
    row = study[n]
    for key, value in expect(n).items():
        error = max(row[f"{key}_sd"] / row["seeds"] ** 0.5, 1e-6)
        assert row[key] == pytest.approx(value, abs=4 * error)
    assert expect(2) == {"unrecoverable": 0.75, "rank": 1.0}
    assert expect(3) == {"unrecoverable": 0.5, "rank": 2 - 5 / 8}


def test_fewer_dimensions_lose_more(study):
    rows = [study[n] for n in DIMENSIONS]
    for key in ("unrecoverable", "maps_with_loss", "collapsed_pairs", "error_linear"):
        values = [row[key] for row in rows]
        assert values == sorted(values, reverse=True)
    assert (
        study[2]["maps_with_loss"] == study[3]["maps_with_loss"] == 1
    )  # fewer than 4 rows cannot be active twice at every point
    for row in rows:
        assert row["error_linear_q50"] <= row["error_pseudo_inverse_q50"]


def test_pseudo_inverse_returns_half_of_the_point_on_average():
    # ReLU(T x) = (T x + |T x|) / 2, and T and -T have the same distribution. With many rows one T is enough.
    points = make_spiral()
    back = project_back(points, draw_embedding(5000, 0))
    np.testing.assert_allclose(back, points / 2, atol=0.04)
    mean = np.mean([project_back(points, draw_embedding(15, seed)) for seed in range(400)], axis=0)
    np.testing.assert_allclose(mean, points / 2, atol=0.05)


def test_command_writes_table_results_and_figure(tmp_path, capsys):
    out = tmp_path / "new" / "manifold"
    assert main([f"--out={out}", "--seeds=5"]) == 0
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out == table
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [str(n) for n in DIMENSIONS]
    assert all(title in table for title in MEASURES.values())
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [row["error_linear"] for row in run_study(5)]
    assert [float(row["error_linear"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    with Image.open(out / "figure.png") as image:
        assert image.size[0] > image.size[1] > 500


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    assert main([f"--out={tmp_path}", "--seeds=1"]) == 2
    assert capsys.readouterr().err == "seeds is 1; valid: 2 or more\n"
    (tmp_path / "file").touch()
    assert main([f"--out={tmp_path / 'file'}", "--seeds=2"]) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "unneeded"), [("__main__", {"jax", "flax", "numpy", "matplotlib"}), ("figure", {"jax", "flax"})]
)
def test_starts_without_what_it_does_not_need(module, unneeded):
    code = f"import sys, benchmarks.manifold.{module}; assert not {unneeded} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
