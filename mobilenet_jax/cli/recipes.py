"""The recipes, which are the files of `configs/`: where they are, and how config files import them.

Nothing here imports JAX.
"""

import sys
from pathlib import Path
from types import ModuleType

from mobilenet_jax.cli.exit_codes import UsageError

# Files of `configs/` that are no recipes: recipes import them.
_SHARED = ("base", "datasets")


def find_recipes() -> Path:
    """Return the folder of the recipes: inside the package if a wheel was installed, beside it in a clone."""
    package = Path(__file__).absolute().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(path: str) -> Path:
    """Return the file of `path[:argument]`: the path of a config file, or the name of a recipe or a study.

    A name has neither a folder nor the suffix .py: `v2` is configs/v2.py, `width` is configs/ablations/width.py.
    Raises UsageError for a file or a name that does not exist; its sentence lists the valid ones.
    """
    text = path.partition(":")[0]
    if "/" in text or text.endswith(".py"):
        if (file := Path(text)).is_file():
            return file
        beside = ", ".join(str(file.parent / f"{name}.py") for name in _list_names(file.parent))
        raise UsageError(f"{file} is not a file; valid: {beside or 'the path of a config file'}")
    folders = (find_recipes(), find_recipes() / "ablations")
    for folder in folders:
        if text in _list_names(folder):
            return folder / f"{text}.py"
    recipes, studies = (", ".join(_list_names(folder)) for folder in folders)
    raise UsageError(
        f"there is no recipe {text!r}; valid: {recipes}; the studies {studies}; or the path of a config file, "
        "which ends in .py"
    )


def _list_names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.py") if file.stem not in _SHARED)


def make_importable(file: Path) -> None:
    """Let the config file `file` import the recipes as `configs`, and the modules beside it, wherever it lies.

    A folder called `configs` is common, and a name of its files may be the name of a recipe. So `configs` is one
    package of several folders, in this order: the folder `configs` that the file lies in, the recipes, and the folders
    `configs` on the path.
    """
    recipes = find_recipes()
    own = next((folder for folder in file.absolute().parents if folder.name == "configs"), None)
    if own != recipes:
        sys.path.insert(0, str(own.parent if own else file.absolute().parent))
    on_path = [Path(entry).absolute() / "configs" for entry in sys.path]
    folders = [*filter(None, [own]), recipes, *(folder for folder in on_path if folder.is_dir())]
    package = ModuleType("configs")
    package.__path__ = [str(folder) for folder in dict.fromkeys(folders)]
    sys.modules["configs"] = package
