"""Recipes by name, and config files outside of the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobilenet_jax.cli.config import load_config
from mobilenet_jax.cli.exit_codes import UsageError
from mobilenet_jax.cli.recipes import find_config, find_recipes
from mobilenet_jax.studies.study import load_study

ROOT = Path(__file__).resolve().parents[2]
MINE = """
from configs import v2

def get_config(size="0.25"):
    config = v2.get_config()
    config.model.width = float(size)
    return config
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Each test is in an empty folder, and what a config file changes of the process does not outlive it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # restored at the end
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)


def refuse(path: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        load_config(path, list(overrides))
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


@pytest.mark.parametrize(
    ("name", "file"),
    [("v2", "v2.py"), ("v2:imagenet", "v2.py"), ("linear_bottleneck", "ablations/linear_bottleneck.py")],
)
def test_a_name_is_a_file_of_the_recipes(name, file, tmp_path):
    (tmp_path / "v2").write_text("a name never means a file in the folder of the user")
    assert find_config(name) == find_recipes() / file == ROOT / "configs" / file


def test_a_recipe_takes_its_argument_and_overrides_with_a_space():
    config = load_config("v2:uc_merced", ["--config.data.image_size=64"])
    assert (config.name, config.data.image_size) == ("mobilenet_v2_uc_merced", 64)
    assert load_study("linear_bottleneck:digits", []).baseline == "linear"


@pytest.mark.parametrize("name", ["v9", "base", "datasets", "ablations", ""])
def test_an_unknown_name_lists_the_valid_ones(name):
    said = refuse(name)
    assert said.startswith(f"there is no recipe {name!r}; valid: distill, fashion_mnist, transfer, v1, v2,")
    assert "; the studies block_forms, " in said


def test_a_config_file_imports_recipes_and_its_neighbours_wherever_it_lies(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.py").write_text(f"from neighbour import NAME\n{MINE}")
    (tmp_path / "deep" / "neighbour.py").write_text("NAME = 1")
    config = load_config("deep/mine.py:0.75", [])
    assert (config.model.width, config.data.source) == (0.75, "digits")


def test_a_folder_called_configs_does_not_hide_the_recipes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "configs" / "base.py").write_text("raise RuntimeError")
    (tmp_path / "configs" / "ours.py").write_text("WIDTH = 0.5")
    assert load_config("v2", []).model.width == 0.5
    (tmp_path / "mine.py").write_text(MINE.replace("float(size)", "ours.WIDTH").replace("v2\n", "ours, v2\n", 1))
    assert load_config("mine.py", []).model.width == 0.5


def test_the_files_of_an_own_folder_called_configs_come_first(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "v1.py").write_text("WIDTH = 0.5")
    text = MINE.replace("float(size)", "v1.WIDTH").replace("v2\n", "v1, v2\n", 1)
    (tmp_path / "configs" / "mine.py").write_text(text)
    assert load_config("configs/mine.py", []).model.width == 0.5


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("model.width", "model.widht", "mine.py: the config has no key 'widht', did you mean width? (line 6)"),
        ("model.width", "modle.width", "mine.py: the config has no key 'modle', did you mean model? (line 6)"),
        ("float(size)", "'wide'", "mine.py: TypeError: "),
        ("return config", "return 1", "mine.py: get_config() returns int; start from base.get_config()"),
        ("    return config", "", "mine.py: get_config() returns NoneType; start from base.get_config()"),
        (
            "return config",
            "with config.unlocked(): del config.seed\n    return config",
            "the config has no seed; start",
        ),
        (
            "return config",
            "with config.unlocked(): config.lr = 1\n    return config",
            "mine.py: the config has lr, which configs/base.py does not have",
        ),
        ("def get_config(", "def get_cfg(", "mine.py has no get_config(): it is not a config file"),
        ("import v2", "import v2, nothing", "mine.py: ImportError: cannot import name 'nothing' from 'configs'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_sentence(tmp_path, before, after, said):
    assert before in MINE
    (tmp_path / "mine.py").write_text(MINE.replace(before, after))
    assert said in refuse("mine.py")


def test_a_config_without_the_keys_of_base_is_one_sentence(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'name': 'x'})\n"
    )
    said = refuse("mine.py")
    assert said.startswith("mine.py: the config has no data.area_range, data.aspect_range, ")
    assert said.endswith(" more keys; start from base.get_config() of `from configs import base`")


def test_an_argument_that_get_config_does_not_take_is_one_sentence(tmp_path):
    (tmp_path / "mine.py").write_text(MINE.replace('size="0.25"', "").replace("float(size)", "0.5"))
    assert "mine.py:digits: TypeError: get_config() takes 0 positional arguments" in refuse("mine.py:digits")


CODE = """
from pathlib import Path
import mobilenet_jax
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.cli.recipes import find_recipes
from mobilenet_jax.studies.study import load_study
print(mobilenet_jax.__version__, find_recipes().relative_to(Path(mobilenet_jax.__file__).parent))
print(load_config("v2:digits", []).name, load_config("mine.py", []).model.width, load_study("width:digits", []).name)
"""


def test_an_installed_package_has_the_recipes_inside(tmp_path):
    """The package as the wheel installs it. `.ci/run` builds and installs the wheel itself."""
    package = tmp_path / "site" / "mobilenet_jax"
    package.mkdir(parents=True)
    for path in (ROOT / "mobilenet_jax").iterdir():
        (package / path.name).symlink_to(path)
    (package / "configs").symlink_to(ROOT / "configs")
    (package / "cli").unlink()  # a folder of its own, because Python resolves no symbolic link for a file beside it
    (package / "cli").mkdir()
    for path in (ROOT / "mobilenet_jax" / "cli").glob("*.py"):
        (package / "cli" / path.name).symlink_to(path)
    (tmp_path / "mine.py").write_text(MINE)
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "0.1.0 configs\nmobilenet_v2_digits 0.25 width\n"
