"""Imports point one way: commands at the top, models at the bottom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mobilenet_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (PACKAGE, "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# What a folder may import of the package beside itself. Commands, at the top, may import everything but each other.
FLOORS = {
    "models": set(),
    "plots": set(),
    "paths": set(),
    "data": {"paths"},
    "workdir": {"paths"},
    "weights": {"workdir", "models", "paths"},
    "exporting": {"cli", "weights", "workdir", "data", "models", "paths"},
    "training": {"exporting", "weights", "workdir", "data", "models", "plots", "paths"},
    "inference": {"exporting", "training", "weights", "data", "models"},
    "diagnosis": {"cli", "inference", "training", "weights", "workdir", "data", "models", "plots", "paths"},
    "cli": set(),
    "studies": {"cli", "training", "workdir", "data", "models", "plots", "paths"},
}
# Inside `models`: the textbook from the network down, and tables of `spec` alone.
MODELS = {
    "network": {"activations", "blocks", "cpu", "init", "layers", "ops", "spec", "zoo"},
    "blocks": {"activations", "attention", "layers", "ops", "spec"},
    "attention": set(),
    "layers": {"activations", "cpu", "cpu_norm", "init", "ops", "spec"},
    "cpu": {"spec"},
    "cpu_norm": {"activations", "cpu"},
    "activations": set(),
    "init": {"ops", "spec"},
    "folded": {"ops", "spec"},
    "ops": set(),
    "spec": {"ops"},
    "options": {"spec"},
    "spec_json": {"spec"},
    **{table: {"spec"} for table in ("v1", "v2", "v3", "v4", "edgetpu")},
    "zoo": {"options", "spec", "v1", "v2", "v3", "v4", "edgetpu"},
    "cost": {"ops", "spec"},
    "summary": {"cost", "ops", "spec", "spec_json"},
}
WITHOUT_JAX = ["ops", "spec", "options", "spec_json", "v1", "v2", "v3", "v4", "edgetpu", "zoo", "cost", "summary"]


def list_imports(name: str) -> set[str]:
    """The modules that a file imports, anywhere in it, of the project or not."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full if full in FILES else str(node.module) for full in inner}
    return found


def list_own(name: str) -> set[str]:
    """The modules of the package that a file imports, without the package's name."""
    return {i.removeprefix(f"{PACKAGE}.") for i in list_imports(name) if i.startswith(f"{PACKAGE}.")}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(f"{PACKAGE}.")])
def test_imports_point_one_way(name):
    floor, _, module = name.removeprefix(f"{PACKAGE}.").partition(".")
    floors = {i.split(".")[0] for i in list_own(name)}
    if floor in FLOORS:
        assert floors - {floor} <= FLOORS[floor]
    else:
        assert floors <= FLOORS.keys()
    if floor == "models" and module in MODELS:
        assert {i.partition(".")[2] for i in list_own(name)} <= MODELS[module]


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_tables_and_their_arithmetic_need_no_jax(name):
    # With the direct imports bound above, no indirect one brings JAX in either.
    others = {i.split(".")[0] for i in list_imports(f"{PACKAGE}.models.{name}")} - {PACKAGE}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("configs.")])
def test_configs_import_ml_collections_and_each_other_alone(name):
    allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
    assert {i.split(".")[0] for i in list_imports(name)} <= allowed


def test_no_module_is_a_drawer():
    names = {name.split(".")[-1] for name in FILES}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("name", FILES)
def test_configs_are_read_without_defaults(name):
    gets = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("config.get")
    ]
    assert [call for call in gets if "," in call] == []
