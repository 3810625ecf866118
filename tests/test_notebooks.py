"""Each notebook runs from top to bottom with small values in the cell of its parameters."""

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.weights.card import IMAGENET, read_imagenet_classes
from mobilenet_jax.weights.save import save_weights
from tests.cards import make_test_card

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a small network that has ImageNet's classes."""
    model = create_model("mobilenet_v2", width=0.1)
    card = make_test_card(
        model.spec,
        name="small",
        width=0.1,
        preprocessing=IMAGENET,
        class_names=read_imagenet_classes(),
        source={"file": "small", "sha256": "0"},
    )
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, model, init_variables(model, seed=0), card)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of ten images in a folder."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(level, level + 50, (70, 90, 3), np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_hold_no_logic(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert not any(re.search(r"^\s*(def|class|while|lambda)\b", cell.source, re.MULTILINE) for cell in cells)
    assert f"main/colab/{path.name})" in notebook.cells[0].source  # the badge opens this notebook
    assert f"(colab/{path.name})" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch, weights, photographs):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = read(path)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    names = set(re.findall(r"^([A-Z_]+) =", notebook.cells[at].source, re.MULTILINE))
    values = {"FAST": True, "WORKDIR": str(tmp_path / "run"), "WEIGHTS": str(weights), "FOLDER": str(photographs)}
    given = "\n".join(f"{name} = {value!r}" for name, value in values.items() if name in names)
    assert {"FAST", "WORKDIR"} <= names
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert list((tmp_path / "run").rglob("*.json"))
