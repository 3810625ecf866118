"""Kill -9 a run at random moments, continue it with the same command, and compare with an uninterrupted run.

    python benchmarks/kill_resume.py --kills=20

Half of the kills come at a moment drawn uniformly from the time of a whole run (imports, compilation, steps,
evaluation), and half within 0.1 s of a new file in the checkpoints folder. If a run ends before all kills are used, it
is compared and a new run starts from nothing. These must be equal to the last bit: every array of the final checkpoint
(parameters, statistics, averages, optimizer), its other content (config, data iterator), result.json, and every key of
metrics.jsonl except times. Each step must be logged once.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from etils import epath

from mobilenet_jax.workdir.checkpoint import read_checkpoint
from mobilenet_jax.workdir.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# A resumed run could get these wrong: momentum, averages, dropout, augmentation (by the recipe), mixup. Evaluations and
# saves are at different steps.
CONFIG = {
    "model.width": 0.1,
    "model.shallow": True,
    "model.dropout": 0.2,
    "data.image_size": 16,
    "data.batch_size": 32,
    "data.mixup": 0.2,
    "optim.name": "rmsprop",
    "optim.lr_per_256": 0.02,
    "ema.decay": 0.9,
    "train.log_every_steps": 1,
    "train.save_every_epochs": 0.1,
    "train.eval_every_epochs": 0.3,
}


def make_command(workdir: Path, *, steps: int, flags: list[str]) -> list[str]:
    """Return the command of a small run on digits, which takes about as long as its start."""
    overrides = [f"--config.{key}={value}" for key, value in {**CONFIG, "train.steps": steps}.items()]
    config = f"--config={ROOT / 'configs' / 'v1.py'}"
    return [sys.executable, "-m", "mobilenet_jax.main", config, f"--workdir={workdir}", *overrides, *flags]


def start(workdir: Path, *, steps: int, flags: list[str]) -> subprocess.Popen:
    """Start the run as a process; its output goes to a file beside the workdir."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            make_command(workdir, steps=steps, flags=flags), stdout=log, stderr=log, env=environment
        )


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Wait for the run's end; raise RuntimeError with the end of its output if it failed."""
    if process.wait():
        words = workdir.with_suffix(".log").read_text()[-2000:]
        raise RuntimeError(f"the run in {workdir} ended with exit code {process.returncode}:\n{words}")


def wait_for_files(process: subprocess.Popen, folder: Path, *, count: int) -> None:
    """Wait until new files have appeared under `folder` `count` times, or the process ends."""

    def list_files() -> set[str]:
        # `os.walk` skips folders that a save renames meanwhile.
        return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}

    known = list_files()
    while process.poll() is None and count:
        found = list_files()
        count -= bool(found - known)
        known |= found
        time.sleep(0.002)


def kill_at_random(process: subprocess.Popen, workdir: Path, *, seconds: float, draw: random.Random) -> str | None:
    """Kill -9 at a moment drawn from `draw`; return the moment in words, or None if the run ended before it."""
    if draw.random() < 0.5:
        delay = draw.uniform(0, seconds)
        moment = f"{delay:.2f} s after the start"
    else:
        count, delay = draw.randint(1, 20), draw.uniform(0, 0.1)
        wait_for_files(process, workdir / "checkpoints", count=count)
        moment = f"{delay * 1000:.0f} ms after files appeared in checkpoints/ for the {count}. time"
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return moment
    if process.returncode:
        raise RuntimeError(f"the run in {workdir} died by itself with exit code {process.returncode}")
    return None


def read_run(workdir: Path | epath.Path) -> dict:
    """Return {name: value} of everything that must be equal in two runs; arrays are (dtype, shape, bytes)."""
    leaves, meta = read_checkpoint(workdir)
    steps = read_metrics(workdir)
    return {
        **{name: (str(leaf.dtype), leaf.shape, leaf.tobytes()) for name, leaf in leaves.items()},
        **{f"checkpoint {name}": value for name, value in meta.items()},
        "steps logged": [line["step"] for line in steps],
        **{
            f"{key} of step {line['step']}": value
            for line in steps
            for key, value in line.items()
            if not key.startswith("time/")
        },
        "result.json": json.loads((workdir / "result.json").read_text()),
    }


def find_differences(expected: dict, found: dict) -> list[str]:
    """Return the names whose values differ."""
    return [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def describe_state(workdir: Path) -> str:
    """Describe the newest checkpoint and the last line of metrics of a killed run."""
    saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    lines = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    logged = lines[-1]["step"] if lines else "none"
    return f"newest checkpoint {max(saved, default='none')}, last line {logged}"


def compare(workdir: Path, *, kills: int, steps: int, seed: int, flags: list[str]) -> int:
    """Return the number of values that differ from an uninterrupted run, over all killed runs; `flags` are main's."""
    draw = random.Random(seed)
    whole = workdir / "whole"
    finish(start(workdir / "warm", steps=steps, flags=flags), workdir / "warm")  # fills the compilation cache
    begun = time.perf_counter()
    finish(start(whole, steps=steps, flags=flags), whole)
    seconds = time.perf_counter() - begun
    expected = read_run(whole)
    if expected["steps logged"] != list(range(1, steps + 1)):
        raise RuntimeError(f"the uninterrupted run logged the steps {expected['steps logged']}")
    print(f"uninterrupted: {steps} steps in {seconds:.1f} s, {len(expected)} values to compare", flush=True)
    wrong, killed, runs = 0, 0, 0
    while killed < kills:
        run = workdir / f"killed_{runs}"
        runs += 1
        while killed < kills:
            begun = time.perf_counter()
            process = start(run, steps=steps, flags=flags)
            try:
                moment = kill_at_random(process, run, seconds=seconds, draw=draw)
            finally:
                process.kill()
            if moment is None:
                seconds = min(seconds, time.perf_counter() - begun)  # the machine was busier when the time was measured
                break
            killed += 1
            print(f"kill {killed:2d}: {moment}: {describe_state(run)}", flush=True)
        finish(start(run, steps=steps, flags=flags), run)
        differences = find_differences(expected, read_run(run))
        wrong += len(differences)
        print(f"run {runs}: {len(differences)} values differ {differences[:5] or ''}", flush=True)
    print(f"{killed} kills, {runs} runs, {wrong} differences")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code, 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments; default: %(default)s")
    parser.add_argument("--workdir", type=Path, help="folder that is kept; default: a temporary folder")
    parser.add_argument("--deterministic", action="store_true", help="give the runs this flag of main; for GPUs")
    args = parser.parse_args(argv)
    workdir = args.workdir or Path(tempfile.mkdtemp())
    flags = ["--deterministic"] if args.deterministic else []
    try:
        return int(compare(workdir, kills=args.kills, steps=args.steps, seed=args.seed, flags=flags) > 0)
    finally:
        if not args.workdir:
            shutil.rmtree(workdir)


if __name__ == "__main__":
    sys.exit(main())
