"""Imports point one way: main -> train -> everything else, and inside models network -> blocks -> layers."""

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
# What these may import of the package. The rest may import each other, but neither train nor main.
ALLOWED = {
    "main": {"train", "config", "evaluate", "malloc", "metrics", "runtime", "data.decode", "weights.load"},
    "predict": {
        "data.decode",
        "data.sources",
        "data.transforms",
        "malloc",
        "metrics",
        "models.cost",
        "models.network",
        "runtime",
        "steps",
        "weights.card",
        "weights.load",
    },
    "config": {"runtime"},
    "runtime": {"malloc"},
    "ablate": {
        "comparison",
        "config",
        "data.decode",
        "data.sources",
        "malloc",
        "models.cost",
        "models.spec",
        "runtime",
        "study",
        "train",
    },
    "comparison": {"figures", "metrics", "study"},
    "study": {"config", "metrics", "models.cost", "models.spec", "models.zoo"},
    "diagnose.__main__": {
        "config",
        "data.decode",
        "data.loader",
        "data.transforms",
        "diagnose.activations",
        "diagnose.page",
        "diagnose.report",
        "diagnose.weights",
        "malloc",
        "metrics",
        "models.cost",
        "predict",
        "runtime",
        "weights.card",
        "weights.load",
    },
    "diagnose.report": {"diagnose.activations", "diagnose.measures", "diagnose.weights", "models.spec"},
    "diagnose.page": {"diagnose.measures", "diagnose.weights"},
    "diagnose.activations": {
        "diagnose.measures",
        "diagnose.weights",
        "models.layers",
        "models.network",
        "models.spec",
        "steps",
    },
    "diagnose.weights": {"diagnose.measures", "models.spec"},
    "diagnose.measures": set(),
    "manifold": {"metrics"},
    "models.network": {
        "models.blocks",
        "models.depthwise",
        "models.init",
        "models.layers",
        "models.spec",
        "models.zoo",
    },
    "models.blocks": {"models.attention", "models.layers", "models.spec"},
    "models.attention": set(),
    "models.layers": {"models.depthwise", "models.init", "models.spec"},
    "models.depthwise": {"models.spec"},
    "models.init": {"models.spec"},
    "models.spec": set(),
    "models.v1": {"models.spec"},
    "models.v2": {"models.spec"},
    "models.v3": {"models.spec"},
    "models.v4": {"models.spec"},
    "models.edgetpu": {"models.spec"},
    "models.zoo": {"models.edgetpu", "models.spec", "models.v1", "models.v2", "models.v3", "models.v4"},
    "models.cost": {"models.spec"},
    "summary": {"models.cost", "models.spec", "models.zoo"},
    "convert": {"weights.load", "weights.save"},
    "features": {"data.sources", "models.layers", "models.network", "models.spec", "sharding", "steps"},
    "batch_stats": {"models.network", "sharding", "steps"},
    "weights.card": {"models.spec", "weights"},
    "weights.naming": {"models.init", "models.spec", "models.zoo", "weights", "weights.card"},
    "weights.torch_names": {"models.spec", "weights.card", "weights.naming"},
    "weights.keras_names": {"models.spec", "weights.card", "weights.naming"},
    "weights.pth": {"weights"},
    "weights.hdf5": {"weights"},
    "weights.fetch": {"weights", "weights.card"},
}
TABLES = ["models.v1", "models.v2", "models.v3", "models.v4", "models.edgetpu"]
WITHOUT_JAX = ["models.spec", *TABLES, "models.zoo", "models.cost", "summary"]


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


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(f"{PACKAGE}.")])
def test_imports_point_one_way(name):
    short = name.removeprefix(f"{PACKAGE}.")
    own = {i.removeprefix(f"{PACKAGE}.") for i in list_imports(name) if i.startswith(f"{PACKAGE}.")}
    assert own - ALLOWED[short] == set() if short in ALLOWED else not own & {"main", "train"}
    if short.startswith(("models.", "data.")):
        assert {i.split(".")[0] for i in own} <= {short.split(".")[0]}


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_tables_and_their_arithmetic_need_no_jax(name):
    # With the direct imports bound above, no indirect one brings JAX in either.
    others = {i.split(".")[0] for i in list_imports(f"{PACKAGE}.{name}")} - {PACKAGE}
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
