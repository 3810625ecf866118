"""Measure the networks on the GPU, TPU or CPU of this machine, and check their answers against the CPU.

    python -m benchmarks.accelerator --json=accelerator.json
    python -m benchmarks.accelerator --small                      on any machine, in less than a minute

It prints images per second of training and inference, the seconds to the first step, the share of a training run that
waits for images, and the largest difference of the logits from those of the CPU.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.models.zoo import MODELS

MODELS_SHOWN = (
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "mobilenet_v4_conv_small",
)
# Options of `create_model`: the default, the textbook, and the depthwise convolution that is fast on a CPU.
FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "plain": {"lowering": "plain"},
    "shifted_sum": {"depthwise_impl": "shifted_sum"},
}
# The difference from the CPU's logits, training and inference steps, and a run on JPEGs.
WHAT = ("difference", "train", "infer", "run")
SMALL: dict[str, Any] = {
    "models": ["mobilenet_v1"],
    "batch_sizes": [8],
    "dtypes": ["float32"],
    "resolution": 32,
    "seconds": 0.05,
    "options": {"width": 0.1, "shallow": True},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program with a usage error for an invalid value."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--models", nargs="+", choices=tuple(MODELS), metavar="MODEL", default=list(MODELS_SHOWN), help="default: V1-V4"
    )
    add("--batch_sizes", nargs="+", type=int, default=[32, 128, 512], help="images in a step; default: 32 128 512")
    add("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"], help="default: both")
    add("--forms", nargs="+", choices=tuple(FORMS), default=list(FORMS), help="default: all")
    add("--what", nargs="+", choices=WHAT, metavar="WHAT", default=list(WHAT), help=f"{' '.join(WHAT)}; default: all")
    add("--resolution", type=int, default=224, help="pixels; default: 224")
    add("--seconds", type=float, default=3.0, help="approximate length of a measurement; default: 3")
    add("--small", action="store_true", help="one small case, in place of the other options: a test of this command")
    add("--json", metavar="FILE", type=Path, help="write all numbers to this file after each case")
    args = parser.parse_args(argv)
    args.options = {}  # of every network
    if args.small:
        vars(args).update(SMALL)
    if min(args.resolution, args.seconds, *args.batch_sizes) <= 0:
        parser.error("resolution, seconds and batch sizes must be above 0")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    return args


def measure_speed(name: str, what: str, batch_size: int, options: dict, *, resolution: int, seconds: float) -> dict:
    """Return images per second, the seconds to the first step, and the memory of a step."""
    import numpy as np

    from benchmarks.speed.workers.jax_worker import load_inference, load_training
    from mobilenet_jax.models.network import create_model

    images = np.random.default_rng(0).integers(256, size=(batch_size, resolution, resolution, 3), dtype=np.uint8)
    load = {"train": load_training, "infer": load_inference}[what]
    run, compiled, about = load(create_model(name, **options), images)
    first = run(1)
    steps = max(1, round(seconds / max(run(2) / 2, 1e-6)))
    memory = compiled.memory_analysis()
    return {
        "images_per_second": steps * batch_size / run(steps),
        "first_step_seconds": about["trace_seconds"] + about["compile_seconds"] + first,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
    }


def compare_with_cpu(name: str, options: dict, *, resolution: int) -> dict[str, float]:
    """Return, for each precision, the largest difference of logits over the largest logit that the CPU computes.

    The network computes 8 random images in float32, with random weights.
    """
    import jax
    import numpy as np

    from mobilenet_jax.models.init import init_variables
    from mobilenet_jax.models.network import create_model

    model = create_model(name, **options)
    variables = init_variables(model, seed=0)
    images = np.random.default_rng(0).normal(size=(8, resolution, resolution, 3)).astype(np.float32)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = np.asarray(jax.jit(model.apply)(variables, images))
    found = {}
    for precision in ("default", "highest"):
        logits = np.asarray(jax.jit(model.clone(precision=precision).apply)(variables, images))
        found[precision] = float(np.abs(logits - expected).max() / np.abs(expected).max())
    return found


def measure_run(name: str, options: dict, *, batch_size: int, resolution: int) -> dict[str, float]:
    """Train 20 steps on JPEGs of ImageNet's size; return images per second and the share of waiting for images."""
    from benchmarks.speed.photographs import write_photographs
    from configs import base
    from mobilenet_jax.training.run import train_and_evaluate
    from mobilenet_jax.workdir.metrics import read_metrics

    config: Any = base.get_config()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), max(64, batch_size))
        (Path(folder) / "test").symlink_to("train")
        settings = {"model.name": name, **{f"model.{key}": value for key, value in options.items()}}
        settings |= {"data.source": "folder", "data.path": folder}
        settings |= {"data.image_size": resolution, "data.batch_size": batch_size, "data.crop": "inception"}
        settings |= {"data.eval_batch_size": batch_size, "train.steps": 20, "train.log_every_steps": 10}
        settings |= {"train.eval_every_epochs": 0.0, "train.save_every_epochs": 0.0}
        config.update_from_flattened_dict(settings)
        train_and_evaluate(config, Path(folder) / "run")
        line = read_metrics(Path(folder) / "run")[-1]
    return {"images_per_second": line["time/images_per_second"], "data_wait": line["time/data_wait"]}


def measure_all(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the result of each case, in order; a case that ends in an error has the key "failed"."""
    import jax

    def attempt(case: dict, measure, *arguments, **options) -> dict:
        try:
            return {**case, **measure(*arguments, **options)}
        except jax.errors.JaxRuntimeError as error:  # above all, too little memory for a large batch
            return {**case, "failed": str(error).splitlines()[0]}

    for name in args.models:
        if "difference" in args.what:
            case = {"what": "difference from CPU", "model": name}
            yield attempt(case, compare_with_cpu, name, args.options, resolution=args.resolution)
        steps = [what for what in args.what if what in ("train", "infer")]
        for dtype, batch_size, what, form in itertools.product(args.dtypes, args.batch_sizes, steps, args.forms):
            case = {"what": what, "model": name, "dtype": dtype, "batch_size": batch_size, "form": form}
            options = {"dtype": dtype, **FORMS[form], **args.options}
            sizes = {"resolution": args.resolution, "seconds": args.seconds}
            yield attempt(case, measure_speed, name, what, batch_size, options, **sizes)
    if "run" not in args.what:
        return
    name, dtype, batch_size = args.models[-1], args.dtypes[0], args.batch_sizes[-1]
    case = {"what": "run on JPEGs", "model": name, "dtype": dtype, "batch_size": batch_size}
    sizes = {"batch_size": batch_size, "resolution": args.resolution}
    yield attempt(case, measure_run, name, {"dtype": dtype, **args.options}, **sizes)


def format_result(result: dict[str, Any]) -> str:
    """Return the line of a case."""
    texts = [f"{value:,.4g}" if isinstance(value, float) else str(value) for value in result.values()]
    return ", ".join(f"{name} {text}" for name, text in zip(result, texts, strict=True))


def run(args: argparse.Namespace) -> int:
    """Measure, print and write all cases; return the exit code, 1 if a case failed."""
    import jax

    from mobilenet_jax.training.sharding import describe_devices

    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:
        raise UsageError(f"JAX finds no CPU to compare with: {error}; unset JAX_PLATFORMS") from error
    about = {"devices": describe_devices(), "jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}
    about |= {"cores": os.cpu_count(), "date": f"{datetime.now(UTC):%Y-%m-%d}", "resolution": args.resolution}
    print(", ".join(f"{name}: {value}" for name, value in about.items()))
    results = []
    for result in measure_all(args):
        results.append(result)
        print(format_result(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return int(any("failed" in result for result in results))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 if a case failed, 2 for a command that cannot be run."""
    args = parse(argv)
    return get_exit_code(lambda: run(args), interrupted="interrupted; the file of --json has the finished cases")


if __name__ == "__main__":
    sys.exit(main())
