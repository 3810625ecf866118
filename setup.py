"""The packages of the wheel: `mobilenet_jax`, with the recipes of `configs/` inside it. pyproject.toml has the rest."""

from setuptools import find_namespace_packages, find_packages, setup

recipes = [f"mobilenet_jax.{name}" for name in find_namespace_packages(include=["configs", "configs.*"])]
setup(
    packages=[*find_packages(include=["mobilenet_jax", "mobilenet_jax.*"]), *recipes],
    package_dir={"mobilenet_jax.configs": "configs"},
)
