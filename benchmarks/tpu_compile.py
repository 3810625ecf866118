"""Compile recipes for TPUs that are not there, and state what the compiler says about the programs.

    python -m benchmarks.tpu_compile --recipes=v2:imagenet --topologies=v5e-1 --json=tpu.json

This needs `libtpu` and no TPU. A training step takes minutes of CPU time to compile.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobilenet_jax.cli.config import load_config
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.models.spec import check_choice

# The arguments of `jax.experimental.topologies.get_topology_desc`. A v4-32 has 16 chips with two cores each.
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "v5e-1": {"topology_name": "v5e:1x1", "chips_per_host_bounds": [1, 1, 1]},
    "v5e-4": {"topology_name": "v5e:2x2"},
    "v5e-8": {"topology_name": "v5e:2x4"},
    "v4-32": {"topology_name": "v4:2x2x4"},
}
RECIPES = ("v1:imagenet", "v2:imagenet", "v3_small:imagenet", "v3_large:imagenet", "v4:conv_small,imagenet")
STEPS = ("train", "eval")
# The instructions of optimized HLO that are counted, and their names in the results.
INSTRUCTIONS = {
    "convolution": "convolutions",
    "copy": "copies",
    "transpose": "transposes",
    "fusion": "fusions",
    "all-reduce": "all_reduces",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program with a usage error for an invalid value."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipes", nargs="+", metavar="FILE:VARIANT", default=list(RECIPES), help=f"default: {' '.join(RECIPES)}")
    add(
        "--topologies", type=_list_of(TOPOLOGIES), default=["v5e-1"], help=f"of {', '.join(TOPOLOGIES)}; default: v5e-1"
    )
    add("--steps", type=_list_of(STEPS), default=list(STEPS), help="train, eval or both; default: both")
    add("--lowering", type=_list_of(("auto", "plain")), default=["auto"], help="auto,plain; default: auto")
    add("--dtype", type=_list_of(("bfloat16", "float32")), default=["bfloat16"], help="default: bfloat16")
    add("--remat", type=_list_of(("off", "on")), default=["off"], help="off,on; default: off")
    add("--images_per_device", type=int, default=128, help="images of a step on each device; default: 128")
    add("--json", metavar="FILE", type=Path, help="write all results to this file after each case")
    args = parser.parse_args(argv)
    if args.images_per_device < 1:
        parser.error(f"--images_per_device is {args.images_per_device}; valid: 1 or more")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    return args


def _list_of(valid):
    def read(text: str) -> list[str]:
        for value in (values := text.split(",")):
            try:
                check_choice("one of them", value, tuple(valid))
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        return values

    return read


def load_recipe(recipe: str, overrides: dict[str, Any]):
    """Return the config of a recipe, "v2:imagenet", with random pixels in place of its data set."""
    name, _, variant = recipe.partition(":")
    file = Path(__file__).resolve().parents[1] / "configs" / f"{name}.py"
    config = load_config(f"{file}:{variant}" if variant else str(file), [])
    classes = config.model.num_classes or 1000
    fake = {"data.source": "fake:1281167", "data.num_classes": classes, "train.cache_features": False}
    config.update_from_flattened_dict({**fake, **overrides})
    return config


def lower_step(config, devices: list[Any], what: str):
    """Return the lowered training or evaluation step of a config for a mesh of `devices`, which may not exist."""
    import jax
    import numpy as np

    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.training.build import build
    from mobilenet_jax.training.loop import make_train_step
    from mobilenet_jax.training.sharding import make_mesh, shard_eval_step
    from mobilenet_jax.training.steps import create_state, eval_step

    with tempfile.TemporaryDirectory() as workdir:
        setup = dataclasses.replace(build(config, workdir), mesh=make_mesh(devices))
    data = config.data
    create = functools.partial(create_state, optimizer=setup.optimizer, ema=config.ema.decay > 0)
    state = jax.eval_shape(create, init_variables(setup.model, seed=0))
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    batch = {
        "images": jax.ShapeDtypeStruct(shape, np.uint8),
        "labels": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }
    if what == "train":
        key = jax.eval_shape(lambda: jax.random.key(0))
        return make_train_step(setup, setup.model, mean=data.mean, std=data.std).lower(state, batch, key)
    step = functools.partial(eval_step, model=setup.model, mean=data.mean, std=data.std)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batch["mask"] = jax.ShapeDtypeStruct(shape[:1], np.bool_)
    return shard_eval_step(step, setup.mesh).lower(variables, batch)


def find_instructions(text: str) -> list[str]:
    """Return the names of all instructions of optimized HLO, in order."""
    return re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z-]*)\(", text, re.M)


def describe_program(compiled) -> dict[str, Any]:
    """Return what the compiler states about a program: bytes of memory and costs of one device, instructions."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    counts = collections.Counter(find_instructions(compiled.as_text()))
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "memory_bytes": held + memory.temp_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        **{name: counts[instruction] for instruction, name in INSTRUCTIONS.items()},
    }


def compile_case(recipe: str, topology: str, what: str, options: dict[str, Any], *, images_per_device: int) -> dict:
    """Compile one step, and return the case with its results; a compiler's refusal is its key "failed"."""
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[topology]).devices
    overrides = {f"model.{name}": value for name, value in options.items()}
    overrides["data.batch_size"] = images_per_device * len(devices)
    config = load_recipe(recipe, overrides)
    case = {"recipe": recipe, "topology": topology, "step": what, **options, "images_per_device": images_per_device}
    case |= {"image_size": config.data.image_size, "devices": len(devices)}
    lowered, start = lower_step(config, list(devices), what), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # above all, the program needs more memory than the device has
        return {**case, "failed": str(error).splitlines()[0]}
    return {**case, "compile_seconds": time.perf_counter() - start, **describe_program(compiled)}


def list_cases(args: argparse.Namespace) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the recipe, the topology, the step and the options of the model of each case."""
    for recipe, topology, what in itertools.product(args.recipes, args.topologies, args.steps):
        for dtype, lowering, remat in itertools.product(args.dtype, args.lowering, args.remat):
            if what == "train" or remat == args.remat[0]:  # evaluation has no backward pass
                yield recipe, topology, what, {"dtype": dtype, "lowering": lowering, "remat": remat == "on"}


def run(args: argparse.Namespace) -> int:
    """Compile all cases, print a line for each and write the results; return the exit code."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            'libtpu, the compiler for TPUs, is not installed; run pip install -e ".[tpu]" -c constraints.txt'
        )
    # Must be set before JAX starts: the compiler does not look for a TPU, and no other device is needed.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    import jax

    about = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "cpu": platform.machine()}
    about |= {"cores": os.cpu_count(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    results = []
    for recipe, topology, what, options in list_cases(args):
        result = compile_case(recipe, topology, what, options, images_per_device=args.images_per_device)
        results.append(result)
        print(format_result(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return int(any("failed" in result for result in results))


def format_result(result: dict[str, Any]) -> str:
    """Return the line of a case."""
    remat = ", remat" if result["remat"] else ""
    case = f"{result['recipe']} {result['step']} {result['topology']} {result['dtype']} {result['lowering']}{remat}"
    if "failed" in result:
        return f"{case}: {result['failed']}"
    gigabytes = {name: result[name] / 1e9 for name in ("memory_bytes", "bytes_accessed")}
    return (
        f"{case}: {gigabytes['memory_bytes']:.2f} GB of memory, {gigabytes['bytes_accessed']:.1f} GB accessed, "
        f"{result['flops'] / 1e9:,.0f} GFLOP, {result['copies']} copies, {result['transposes']} transposes, "
        f"{result['convolutions']} convolutions, compiled in {result['compile_seconds']:.0f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if a program does not compile, 2 if nothing can be compiled."""
    args = parse(argv)
    return get_exit_code(lambda: run(args), interrupted="interrupted; the file of --json has the finished cases")


if __name__ == "__main__":
    sys.exit(main())
