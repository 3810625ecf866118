"""Eight CPU devices, strict shapes, and the reference data beside the checkout."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

if not hasattr(jax, "enable_x64"):  # JAX before 0.8 has it in `jax.experimental`
    jax.enable_x64 = jax.experimental.enable_x64  # pyright: ignore[reportAttributeAccessIssue]
# Before any array exists: the backend reads these once.
jax.config.update("jax_platforms", "cpu")
# Compile in a quarter of the time, here and in the processes that tests start: XLA's older code generator, and no
# threads. XLA ends a process that has a flag which it does not know, as JAX 0.11.2 does with the first. These releases
# are those of constraints.txt and constraints-oldest.txt; with others, the tests take longer.
if version("jaxlib") in ("0.7.2", "0.10.2") and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
jax.config.update("jax_num_cpu_devices", 8)
# [B, C] + [C] must say which axis it means.
jax.config.update("jax_numpy_rank_promotion", "raise")

SLOWEST = {"test_notebooks", "test_network", "test_run", "test_configs", "test_phases", "test_sharding", "test_load"}


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs are shared by the workers, by the processes that tests start, and with the next run."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("compiled")))  # pyright: ignore[reportOptionalMemberAccess]
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Nearly all of the time is compilation. Without LLVM's optimizations it takes two thirds of the time, here and in
    # the processes that tests start. Tests that hold numbers users see take the fixture `optimized`.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    config.option.loadscopereorder = False  # keep the order of `pytest_collection_modifyitems`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest files first: a worker that takes one of them last keeps the others waiting."""
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data beside the checkout; the test is skipped in a clone without it."""
    path = Path(__file__).resolve().parents[1] / ".." / "shared"
    if not path.is_dir():
        pytest.skip("the reference data beside the checkout (../shared) is not there")
    return path


@contextlib.contextmanager
def _show_one_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.fixture(scope="session")
def show_one_device() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which JAX has one device: a program for all eight takes ten times as long to compile."""
    return _show_one_device


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile with all optimizations, as users do; `.ci/run` also has the code generator that users have."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def one_device() -> Iterator[None]:
    """Have JAX show one device for the length of a test."""
    with _show_one_device():
        yield


@pytest.fixture(scope="session")
def tiny_weights():
    """(model, variables, card) of a small network with three named classes."""
    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.models.network import create_model
    from mobilenet_jax.weights.card import HALF
    from tests.cards import make_test_card

    model = create_model("mobilenet_v1", width=0.1, num_classes=3, shallow=True)
    card = make_test_card(
        model.spec,
        width=0.1,
        preprocessing=replace(HALF, image_size=32, crop_share=0.8),
        class_names=["red", "green", "blue"],
    )
    variables = init_variables(model, seed=0)
    variables["params"]["classifier"]["bias"] = np.array([0.1, 0.2, 0.4], np.float32)
    return model, variables, card


@pytest.fixture(scope="session")
def write_images():
    """(folder, count) -> the paths of that many images of noise, of several sizes."""

    def write(folder: Path, count: int) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(count)
        paths = [folder / f"{i:02d}.png" for i in range(count)]
        for i, path in enumerate(paths):
            Image.fromarray(rng.integers(256, size=(30 + i, 50 - i, 3), dtype=np.uint8)).save(path)
        return paths

    return write


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Leave the files of figures empty: a run would take two seconds to draw them."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test saves, to look at what they hold."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved
