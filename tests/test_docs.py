"""The documents: commands run or say what they need; flags, keys, files, imports and tests that a page names exist."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from configs import base
from mobilenet_jax.__main__ import COMMANDS as CONSOLE
from mobilenet_jax.cli.config import load_config, split_overrides
from mobilenet_jax.training.config import flatten_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KEYS = flatten_config(base.get_config()).keys()
MARK = r"(?:^<!-- (?P<mark>(?:needs|run by): .+?) -->\n)?"
FENCE = re.compile(MARK + r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# Steps of an installation. What they install is checked against pyproject.toml, by name.
INSTALLATION = re.compile(r"python3 -m venv|\. \.venv/bin/activate$|pip install|pre-commit install$|mkdocs serve$")
# What makes a command short, after its own arguments: two steps of a V1 with eight blocks.
TINY = ["--config.train.steps=2", "--config.data.image_size=16", "--config.model.name=mobilenet_v1"]
TINY += ["--config.model.width=0.1", "--config.model.lowering=plain", "--config.model.shallow=True"]
LIGHT = {
    "mobilenet_jax.main": TINY,
    "mobilenet_jax.ablate": ["--dry_run"],
    "benchmarks.manifold": ["--seeds=2"],
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None  # what its commands need, or which other test runs them

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A Python command of a block."""

    block: Block
    module: str
    arguments: list[str]


def read_blocks() -> list[Block]:
    return [
        Block(page, text[: found.start("text")].count("\n") + 1, found["language"], found["text"], found["mark"])
        for page, text in PAGES.items()
        for found in FENCE.finditer(text)
    ]


def split_commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def parse_command(block: Block, text: str) -> Command | None:
    words = shlex.split(text, comments=True)
    if words[0] == "mobilenet-jax":
        return Command(block, f"mobilenet_jax.{CONSOLE[words[1]][0]}", words[2:])
    if words[:2] == ["python", "-m"]:
        return Command(block, words[2], words[3:])
    if words[0] == "python" and words[1].endswith(".py"):
        return Command(block, words[1].removesuffix(".py").replace("/", "."), words[2:])
    return None


BLOCKS = read_blocks()
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [
    command
    for block in SHELL
    for text in split_commands(block.text)
    if (command := parse_command(block, text)) and command.module != "pytest"
]
RUNS = list({(c.module, *c.arguments): c for c in COMMANDS if c.block.mark is None}.values())
SNIPPETS = [block for block in PYTHON if block.mark is None]

# Runs (module, arguments...) or Python code, one after the other in one process, and prints what came of each.
DRIVER = """
import contextlib, io, json, runpy, sys, traceback
results = []
for target, *arguments in json.loads(sys.stdin.read()):
    said, code = io.StringIO(), 0
    sys.argv = [target, *arguments]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if chr(10) in target:
                exec(compile(target, "snippet", "exec"), {"__name__": "snippet"})
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            code = error.code or 0
        except Exception:
            code = traceback.format_exc()
    results.append((code, said.getvalue()))
json.dump(results, sys.stdout)
"""


def make_clone(folder: Path) -> None:
    """A folder that looks like a clone of the repository, with photographs of two classes in it."""
    for name in ("benchmarks", "configs", "docs", "mobilenet_jax"):
        (folder / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "photographs" / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 255, (40, 30, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photographs" / name / f"{i}.png")
    (text,) = [block.text for block in PYTHON if block.page == "docs/own_config.md" and "def get_config" in block.text]
    (folder / "my_config.py").write_text(text)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    make_clone(folder)
    return folder


@pytest.fixture(scope="module")
def answers(clone):
    """{what was run: (exit code, output)}: every run of the pages in a light form, every snippet, every --help."""
    training = [c for c in RUNS if c.module == "mobilenet_jax.main"]
    others = [c for c in RUNS if c.module != "mobilenet_jax.main"]
    asked = {(c.module, *c.arguments): [c.module, *c.arguments, *LIGHT.get(c.module, [])] for c in (*training, *others)}
    asked |= {(block.text,): [block.text.replace("224", "32")] for block in SNIPPETS}
    asked |= {(c.module, "--help"): [c.module, "--help"] for c in COMMANDS}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=clone,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
        input=json.dumps(list(asked.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_a_command_is_run_here_or_its_block_says_what_it_needs(block):
    if block.mark is not None:
        kind, _, what = block.mark.partition(": ")
        assert kind == "needs" or (ROOT / what).is_file(), block.place
        return
    for text in split_commands(block.text):
        known = INSTALLATION.match(text) or text == "python -m pytest -n 2" or parse_command(block, text)
        assert known, f"{block.place}: no test runs {text!r}; mark its block: needs or run by"


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command.block.place)
def test_commands_end_well(answers, command):
    code, output = answers[command.module, *command.arguments]
    assert code == 0, f"{command.block.place}: {output}"


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.place)
def test_snippets_end_well(answers, block):
    code, output = answers[block.text,]
    assert code == 0, f"{block.place}: {code}\n{output}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.block.place)
def test_flags_and_keys_of_commands_exist(answers, clone, command, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, usage = answers[command.module, "--help"]
    assert code == 0, usage
    arguments, overrides = split_overrides(command.arguments)
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert flags <= set(re.findall(r"--\w+", usage)), command.block.place
    if "--config" in arguments:
        load_config(arguments[arguments.index("--config") + 1], overrides)


@pytest.mark.parametrize("page", PAGES)
def test_keys_files_and_links_of_a_page_exist(page):
    text = PAGES[page]
    keys = set(re.findall(r"--config\.([a-z][a-z_.]*[a-z])[=` ]", text))
    keys |= set(re.findall(r"`((?:model|data|train|optim|ema)(?:\.(?!py\b)[a-z]\w*)+)", text))
    assert keys <= set(KEYS)
    files = re.findall(r"`((?:mobilenet_jax|configs|benchmarks|tests|colab|docs)/[\w./]*\w)[/:`]", text)
    assert [name for name in files if not (ROOT / name).exists()] == []
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_imports_of_python_blocks_resolve(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert [name for name in names if not importlib.util.find_spec(f"{node.module}.{name}")] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_installations_name_extras_that_exist():
    texts = [text for block in SHELL for text in split_commands(block.text) if text.startswith("pip install")]
    extras = {name for text in texts for group in re.findall(r"\.\[([\w,]+)\]", text) for name in group.split(",")}
    assert extras <= PROJECT["optional-dependencies"].keys()
    assert all("-c constraints.txt" in text for text in texts if "-e ." in text)


def test_the_oldest_environment_of_ci_has_the_lower_bounds_of_the_package():
    bounds = {name: bound for text in PROJECT["dependencies"] for name, bound in [text.split(">=")]}
    text = (ROOT / "constraints-oldest.txt").read_text()
    pins = dict(reversed(re.findall(r"^([\w-]+)==([\d.]+)", text, re.M)))  # the first pin is that of Python 3.11
    assert [name for name, bound in bounds.items() if not f"{pins[name.lower()]}.".startswith(f"{bound}.")] == []
    tests = re.findall(r"\btests/[\w/.]+", (ROOT / ".ci" / "run").read_text())
    assert tests
    assert [name for name in tests if not (ROOT / name).exists()] == []


def test_the_readme_is_short_and_its_test_command_is_what_ci_runs():
    readme = PAGES["README.md"]
    assert readme.count("\n") <= 150
    first, second, *_ = [block.text.strip() for block in SHELL if block.page == "README.md"]
    assert first.startswith("python3 -m venv")
    assert second.startswith("python3 -m venv")
    (pattern,) = re.findall(r"sed -n '(s/.*?)' README\.md", (ROOT / ".ci" / "run").read_text())
    found = subprocess.run(["sed", "-n", pattern, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0] == second.split("&&")[-1].strip() == "python -m pytest -n 2"


def test_traps_and_the_tests_named_after_them_are_listed():
    sections = re.split(r"^### Trap (\d\d): ", PAGES["docs/traps.md"], flags=re.M)[1:]
    listed = {
        number: set(re.findall(r"`(test_trap_\w+)`", text.split("\nTests: ")[-1]))
        for number, text in zip(sections[::2], sections[1::2], strict=True)
    }
    assert list(listed) == [f"{number:02}" for number in range(1, len(listed) + 1)]
    written: dict[str, set[str]] = {number: set() for number in listed}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_trap_\w+)", path.read_text(), re.M):
            for number in re.findall(r"trap_(\d\d)", name):
                written[number].add(name)
    assert listed == written
    untested = [number for number, text in zip(sections[::2], sections[1::2], strict=True) if "\nNo test: " in text]
    assert untested == [number for number, names in written.items() if not names]


def test_each_question_about_the_code_is_answered_by_one_file():
    table = PAGES["docs/architecture.md"].partition("## Seven questions\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| W")]
    assert len(rows) == 7
    for question, answer in rows:
        assert question.endswith("?")
        assert len(re.findall(r"`((?:mobilenet_jax|configs)/\S+\.py)`", answer)) == 1


def test_the_address_of_the_repository_is_written_once_and_copied_by_the_notebooks_alone():
    address = PROJECT["urls"]["Repository"]
    where = address.removeprefix("https://github.com/")
    for path in [*map(ROOT.joinpath, PAGES), ROOT / "mkdocs.yml", ROOT / "CITATION.cff", ROOT / "CHANGELOG.md"]:
        assert where not in path.read_text(), path
    for path in sorted((ROOT / "colab").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        text = "".join("".join(cell["source"]) for cell in cells)
        assert f'REPOSITORY = "{address}"' in text
        assert re.findall(r"github(?:\.com)?/([\w-]+/\w+)/blob", text) == [where]
        assert re.findall(r"https://github\.com/\S+?(?=[\"\s)])", text) == [address]


def test_the_site_has_every_page_in_its_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    sections = [section for entry in config["nav"] for section in entry.values()]
    listed = [
        page
        for section in sections
        for entry in ([{"": section}] if isinstance(section, str) else section)
        for page in entry.values()
    ]
    written = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and "/table.md" not in page]
    assert sorted(listed) == sorted(written)
