"""Measure cases, print each result as it comes, and write all results as JSON."""

import argparse
import datetime
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.cases import Case, count_work, make_cases
from benchmarks.speed.predictions import measure_predictions
from benchmarks.speed.startup import measure_startup
from benchmarks.speed.turns import SIDES, WorkerError, measure, pin_to_cores

# Peers that may run in an interpreter of their own.
FOREIGN = ("torch", "keras", "litert", "onnx", "tfdata")


def run_case(case: Case, args: argparse.Namespace, images: str) -> dict:
    """Measure a case; return the case, its work and the results of `turns.measure` as plain data."""
    peers = args.against if case.devices == 1 else [side for side in args.against if side == "flax"]
    sides = ["ours", *(side for side in peers if side in SIDES[case.what])]
    message = {
        **asdict(case),
        "threads": args.threads,
        "options": args.options,
        "images": images,
        "workers": args.workers,
    }
    pythons = {peer: getattr(args, f"python_{peer}") for peer in FOREIGN}
    pythons["torch_compile"] = args.python_torch
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
    """Yield the start-up of each model, with its recipe on digits and then with the first values of the flags."""
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


def run_predictions(args: argparse.Namespace, photographs: Path) -> Iterator[dict]:
    """Yield the time that naming the photographs of a folder takes with each model, on every side that can do it."""
    for model in args.models:
        measured = measure_predictions(
            model,
            photographs,
            against=args.against,
            pythons={peer: python for peer in FOREIGN if (python := getattr(args, f"python_{peer}"))},
            rounds=args.rounds,
            threads=args.threads,
        )
        yield {"group": "predict", "what": "predict", "name": model, "resolution": 224, "batch_size": 32, **measured}


def format_result(title: str, result: dict) -> str:
    """Format a title, a line for each side, and a line for each side that is absent or failed."""
    format_side = _format_start if result["what"] == "startup" else _format_side
    lines = [title, *(f"  {side:<14}{format_side(side, result)}" for side in result["sides"])]
    lines += [f"  {kind}: {text}" for kind in ("absent", "failed") for text in result[kind].values()]
    return "\n".join(lines)


def _format_start(side: str, result: dict) -> str:
    """Format the seconds of a start, and the median of each part."""
    times, splits = (result["sides"][side][key] for key in ("seconds", "split"))
    split = ", ".join(f"{key} {statistics.median(s[key] for s in splits):.1f}" for key in splits[0])
    return f"{statistics.median(times):>10.1f} s ({min(times):.1f}-{max(times):.1f}): {split}"


def _format_side(side: str, result: dict) -> str:
    """Format images/s, milliseconds per image, multiply-adds/s, compile time, memory, and the ratio to our speed."""
    values, text = result["sides"][side], ""
    if rate := values.get("images_per_second"):
        text += f"{rate:>10.2f} images/s{1000 / rate:>10.2f} ms"
        if "madds" in result:
            text += f"{rate * result['madds'] / 1e9:>8.2f} G madds/s"
    if "compile_seconds" in (about := values["about"]):
        text += f"{about['compile_seconds']:>8.1f} s compile"
        text += f"{about['temporary_bytes_per_image'] / 1e6:>9.1f} MB per image"
    if "peak_bytes" in about:
        text += f"{about['peak_bytes'] / 1e6:>9.0f} MB held by the process"
    if ratio := result["ratios"].get(side):
        text += f"   ours is {ratio['median']:.2f} times as fast ({ratio['min']:.2f}-{ratio['max']:.2f})"
    return text


def describe_run(args: argparse.Namespace) -> dict:
    """Return the date, the machine, its load, and the flags of a benchmark, without the flags that are paths."""
    from mobilenet_jax.workdir.environment import environment

    places = {"json", "draw", "out", *(f"python_{peer}" for peer in FOREIGN)}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],  # mean number of running or waiting processes in the last minute
        "environment": environment([f"cpu: {args.threads} cores for each side"]),
        "flags": {key: value for key, value in vars(args).items() if key not in places},
    }


def measure_all(args: argparse.Namespace) -> int:
    """Measure everything that the flags ask for; return the exit code, 1 if a side failed."""
    from mobilenet_jax.workdir.files import write_json_atomic

    cases = list(make_cases(args))
    for case in cases:
        count_work(case, args.options)  # raises ValueError for an impossible network before anything is measured
    report = {**describe_run(args), "results": []}
    cores = f"{args.threads} of {report['environment']['cpu_count']} cores"
    print(f"{report['environment']['cpu']}, {cores}, load {report['load_average']:.1f}, {report['date']}")

    def add(title: str, result: dict) -> None:
        report["results"].append(result)
        print(format_result(title, result), flush=True)
        if args.json:
            write_json_atomic(args.json, report)

    with TemporaryDirectory() as folder, pin_to_cores(args.threads):
        if {"input", "predict"} & set(args.what):
            from benchmarks.speed.photographs import write_photographs

            report["photographs"] = write_photographs(Path(folder), args.photographs, args.photograph_size)
        for case in cases:
            add(str(case), run_case(case, args, folder))
        for result in run_predictions(args, Path(folder)) if "predict" in args.what else ():
            add(f"predict {result['name']}, {result['count']} photographs", result)
        for result in run_startup(args) if "startup" in args.what else ():
            add(f"startup {result['name']}", result)
    return 1 if any(result["failed"] for result in report["results"]) else 0
