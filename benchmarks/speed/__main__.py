"""Measure our training step, inference, input and start beside the peers that are installed.

Each side is a process of its own; they take turns on the same cores, and a ratio is that of one round.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.startup import measure_startup
from benchmarks.speed.turns import SIDES, WorkerError, measure, pin_to_cores
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.spec import check_choice
from mobilenet_jax.models.zoo import MODELS, make_spec

WHAT = ("train", "infer", "memory", "scaling", "input", "startup")
PEERS = {
    "flax": "our network as Flax's plain layers write it, grouped convolutions and all",
    "keras": "Keras on JAX",
    "torch": "torchvision, timm for V1 and V4, channels_last",
    "litert": "LiteRT with XNNPACK on Keras' V1 to V3, of inference alone",
    "tfdata": "tf.data, of the input alone",
}
# `scaling` moves one of these at a time, from the first value of each flag.
SCALING = {
    "width": (0.35, 0.5, 0.75, 1.0, 1.4),
    "resolution": (96, 128, 160, 192, 224),
    "batch_size": (4, 8, 16, 32, 64),
    "devices": (1, 2, 4),
}
# One option of config.data each; erasing and mixing at every image, so that the cost is that of doing it.
AUGMENTATIONS = (
    "color_jitter=0.4",
    "randaugment_layers=2",
    "erasing=1.0",
    "mixup=0.2",
    "cutmix=1.0",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure, on every side that has it."""

    group: str  # of WHAT
    what: str  # of turns.SIDES
    name: str  # of the model, or what the input does
    width: float = 1.0
    resolution: int
    batch_size: int
    devices: int = 1

    def __str__(self) -> str:
        width = f" {self.width:g}" if self.name in MODELS else ""
        devices = f", {self.devices} devices" if self.devices > 1 else ""
        return f"{self.group} {self.name}{width}, {self.resolution} px, batch {self.batch_size}{devices}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with a usage error for a value that is none of the valid ones."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Sides: ours, and\n" + "\n".join(f"  {name:<7} {text}" for name, text in PEERS.items()),
    )
    add = parser.add_argument
    models = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    add("--what", type=_list_of(str, WHAT), default=["train", "infer"], help=f"of {', '.join(WHAT)}")
    add("--models", type=_list_of(str, tuple(MODELS)), default=list(models), help="of summary's; default: V1 to V3")
    add("--against", type=_list_of(str, tuple(PEERS)), default=list(PEERS), help="sides; default: all, '' for none")
    add("--width", type=_list_of(float), default=[1.0], help="width multipliers; default: 1")
    add("--resolution", type=_list_of(int), default=[224], help="pixels; default: 224")
    add("--batch_size", type=_list_of(int), default=[16], help="images a step; default: 16")
    add("--rounds", type=int, default=5, help="turns of each side; default: 5")
    add("--seconds", type=float, default=2.0, help="about the length of a turn; default: 2")
    add("--threads", type=int, default=2, help="cores that all sides run on; default: 2")
    add("--options", type=_options, default={}, help='of create_model, for our sides, as \'{"dtype": "bfloat16"}\'')
    add("--photographs", type=int, default=2000, help="JPEGs made for the input; default: 2000")
    add("--workers", type=int, default=0, help="data.workers of our input; default: 0")
    for peer in ("torch", "keras", "litert", "tfdata"):
        add(f"--python_{peer}", metavar="PYTHON", type=_program, help=f"the interpreter that has {peer}'s packages")
    add("--json", metavar="FILE", type=Path, help="write all numbers there, anew after each case")
    add("--draw", metavar="FILE", type=Path, nargs="+", help="measure nothing: draw and tabulate such files")
    add("--out", metavar="DIR", type=Path, default=Path("docs"), help="where --draw puts its figures; default: docs")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads, args.photographs, *args.width, *args.resolution, *args.batch_size) <= 0:
        parser.error("rounds, threads, photographs, widths, resolutions and batch sizes are above 0")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    return args


def _list_of(kind: type, valid: tuple[str, ...] = ()):
    def read(text: str) -> list:
        values = [kind(part) for part in text.split(",") if part]
        for value in values if valid else ():
            try:
                check_choice("one of them", value, valid)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        return values

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def _options(text: str) -> dict:
    valid = "valid: a JSON object of create_model's options but lowering, which tells our side from flax"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON; {valid}") from error
    if not isinstance(options, dict) or "lowering" in options:
        raise argparse.ArgumentTypeError(f"{text!r}; {valid}")
    return options


def _program(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return text


def make_cases(args: argparse.Namespace) -> Iterator[Case]:
    """What the flags ask for, in order; start-up is no case, for it has no sides."""
    sizes = {"resolution": args.resolution[0], "batch_size": args.batch_size[0]}
    for group in args.what:
        if group == "input":
            yield Case(group=group, what="input", name="Inception crop and flip", **sizes)
            for name in AUGMENTATIONS:
                yield Case(group=group, what="augment", name=name, **sizes)
        elif group == "scaling":
            for model in args.models:
                base = Case(group=group, what="train", name=model, width=args.width[0], **sizes)
                moved = (replace(base, **{key: value}) for key, values in SCALING.items() for value in values)
                yield from dict.fromkeys((base, *moved))
        elif group != "startup":
            for model, *values in itertools.product(args.models, args.width, args.resolution, args.batch_size):
                keys = dict(zip(("width", "resolution", "batch_size"), values, strict=True))
                yield Case(group=group, what=group, name=model, **keys)


def count_work(case: Case, options: dict) -> dict[str, int]:
    """Multiply-adds of an image, and float32 bytes of activations that its backward pass needs, from the tables.

    Raises ValueError for a network that does not exist.
    """
    if case.name not in MODELS:
        return {}
    own = {key: value for key, value in options.items() if key not in ("dtype", "remat", "depthwise_impl")}
    cost = compute_cost(make_spec(case.name, width=case.width, **own), case.resolution)
    return {"madds": cost.madds, "activation_bytes": 4 * cost.training_elements}


def run_case(case: Case, args: argparse.Namespace, images: str) -> dict:
    """The measurements of a case as plain data: the case, its work, and what `turns.measure` returns."""
    peers = args.against if case.devices == 1 else [side for side in args.against if side == "flax"]
    sides = ["ours", *(side for side in peers if side in SIDES[case.what])]
    message = {
        **asdict(case),
        "threads": args.threads,
        "options": args.options,
        "images": images,
        "workers": args.workers,
    }
    pythons = {peer: getattr(args, f"python_{peer}") for peer in ("torch", "keras", "litert", "tfdata")}
    measured = measure(
        message,
        sides,
        pythons={side: python for side, python in pythons.items() if python},
        rounds=0 if case.what == "memory" else args.rounds,
        seconds=args.seconds,
    )
    for result in measured["sides"].values():
        if result["seconds"]:
            result["images_per_second"] = case.batch_size / statistics.median(result["seconds"])
    return {**asdict(case), **count_work(case, args.options), **measured}


def run_startup(args: argparse.Namespace) -> Iterator[dict]:
    """The recipe on digits as it is, then the same network at the flags' width, resolution and batch size."""
    asked = {
        "model.width": args.width[0],
        "model.stride_one": "()",
        "data.image_size": args.resolution[0],
        "data.batch_size": args.batch_size[0],
    }
    for model in args.models:
        for name, overrides in ((f"{model} on digits", {}), (f"{model}, {args.resolution[0]} px", asked)):
            result = {"group": "startup", "what": "startup", "name": name, "sides": {}, "absent": {}, "failed": {}}
            try:
                result["sides"] = measure_startup({"model.name": model, **overrides}, rounds=args.rounds)
            except (WorkerError, FileNotFoundError) as error:
                result["failed"]["ours"] = str(error)
            yield result


def format_result(title: str, result: dict) -> str:
    """A line a side: images/s, milliseconds an image, how much faster ours is, compile time, memory, work."""
    lines = [title]
    for side, values in result["sides"].items():
        if result["what"] == "startup":
            times, splits = values["seconds"], values["split"]
            split = ", ".join(f"{key} {statistics.median(s[key] for s in splits):.1f}" for key in splits[0])
            spread = f"{min(times):.1f}-{max(times):.1f}"
            lines.append(f"  {side:<8}{statistics.median(times):>10.1f} s ({spread}): {split}")
            continue
        about, rate, text = values["about"], values.get("images_per_second"), f"  {side:<8}"
        if rate:
            text += f"{rate:>10.2f} images/s{1000 / rate:>10.2f} ms"
            if "madds" in result:
                text += f"{rate * result['madds'] / 1e9:>8.2f} G madds/s"
        if "compile_seconds" in about:
            text += f"{about['compile_seconds']:>8.1f} s compile"
            text += f"{about['temporary_bytes_per_image'] / 1e6:>9.1f} MB an image"
        if side in result["ratios"]:
            ratio = result["ratios"][side]
            text += f"   ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f}-{ratio['max']:.2f})"
        lines.append(text)
    lines += [f"  {kind}: {text}" for kind in ("absent", "failed") for text in result[kind].values()]
    return "\n".join(lines)


def describe_run(args: argparse.Namespace) -> dict:
    """When and on what a benchmark was run, how busy that was with other work, and the flags that are no places."""
    from mobilenet_jax.workdir.environment import environment

    places = {"json", "draw", "out", *(f"python_{peer}" for peer in PEERS)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],  # processes that ran or waited in the minute before
        "environment": environment([f"cpu: {args.threads} cores for each side"]),
        "flags": {key: value for key, value in vars(args).items() if key not in places},
    }


def run(args: argparse.Namespace) -> int:
    """Measure everything asked for, printing as it comes; exit code 1 if a side failed."""
    from mobilenet_jax.workdir.files import write_json_atomic

    cases = list(make_cases(args))
    for case in cases:
        count_work(case, args.options)  # an impossible network is refused before anything is measured
    report = {**describe_run(args), "results": []}
    cores = f"{args.threads} of {report['environment']['cpu_count']} cores"
    print(f"{report['environment']['cpu']}, {cores}, load {report['load_average']:.1f}, {report['date']}")

    def add(title: str, result: dict) -> None:
        report["results"].append(result)
        print(format_result(title, result), flush=True)
        if args.json:
            write_json_atomic(args.json, report)

    with TemporaryDirectory() as folder, pin_to_cores(args.threads):
        if "input" in args.what:
            from benchmarks.speed.photographs import write_photographs

            report["photographs"] = write_photographs(Path(folder), args.photographs)
        for case in cases:
            add(str(case), run_case(case, args, folder))
        for result in run_startup(args) if "startup" in args.what else ():
            add(f"startup {result['name']}", result)
    return 1 if any(result["failed"] for result in report["results"]) else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, 1 where a side failed, 2 for a command that cannot be obeyed."""
    args = parse(argv)
    try:
        if args.draw:
            from benchmarks.speed.charts import draw_all, format_table

            results = [result for file in args.draw for result in json.loads(file.read_text())["results"]]
            print(format_table(results))
            for path in draw_all(results, args.out):
                print(path)
            return 0
        return run(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the file of --json has the cases that were measured", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
