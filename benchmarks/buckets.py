"""Whole runs in buckets of emulators on this machine: preempted, killed, continued and evaluated.

    python -m benchmarks.buckets

In gs://, two processes with four CPU devices each train. SIGTERM to one of them stops both; the same command continues;
kill -9 of both after a later checkpoint ends them; the same command continues to the end. One process evaluates the
run. In s3://, one process trains, is killed with kill -9 after a checkpoint, continues and is evaluated. Each run must
be equal, to the last bit, to an uninterrupted run on disk. This needs the extra `cloud`, gcp-storage-emulator and
moto[server].
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec.config
from etils import epath

from benchmarks.emulators import emulate_gcs, emulate_s3, list_missing
from benchmarks.kill_resume import CONFIG, ROOT, find_differences, read_run
from mobilenet_jax.workdir.reading import list_steps

STEPS = 40
SECONDS = 600  # after which a process counts as hanging
# Programs that compile in seconds.
OWN = {"train.steps": STEPS, "model.shallow": True, "model.lowering": "plain", "data.mixup": 0.0}


def start(workdir: str, *, processes: int, devices: int, mode: str = "train") -> list[subprocess.Popen]:
    """Start the command line on some processes with some CPU devices each."""
    command = [sys.executable, "-m", "mobilenet_jax.main", f"--config={ROOT / 'configs' / 'v1.py'}"]
    command += [f"--workdir={workdir}", f"--mode={mode}"]
    command += [f"--config.{key}={value}" for key, value in {**CONFIG, **OWN}.items()]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return [
        subprocess.Popen(
            command + ([f"--process_id={i}"] if processes > 1 else []),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running: list[subprocess.Popen]) -> str:
    """Wait for processes, which must succeed; return what the first one printed on stdout."""
    try:
        said = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        raise RuntimeError(
            "\n".join(f"exit code {p.returncode}: {err}" for p, (_, err) in zip(running, said, strict=True))
        )
    return said[0][0]


def wait_for_checkpoint(running: list[subprocess.Popen], workdir: str, *, after: int) -> int:
    """Wait until a checkpoint of a later step than `after` is finished; return its step."""
    folder, deadline = epath.Path(workdir) / "checkpoints", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        newest = max(list_steps(folder), default=0) if folder.exists() else 0
        if newest > after:
            return newest
        if any(process.poll() is not None for process in running):
            finish(running)
            raise RuntimeError(f"{workdir} was finished before it was interrupted; more STEPS are needed")
        time.sleep(0.1)
    raise RuntimeError(f"{workdir} has no new checkpoint after {SECONDS} s")


def interrupt(start_run: Callable[[], list[subprocess.Popen]], workdir: str, *, after: int, kill: bool) -> int:
    """Start a run and interrupt it after a new checkpoint; return the step of its newest checkpoint then."""
    running = start_run()
    try:
        newest = wait_for_checkpoint(running, workdir, after=after)
        if kill:
            for process in running:
                process.kill()
        else:
            running[-1].send_signal(signal.SIGTERM)
            finish(running)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    newest = max(list_steps(epath.Path(workdir) / "checkpoints"), default=newest)
    print(f"{workdir}: {'kill -9' if kill else 'SIGTERM'} after the checkpoint of step {newest}", flush=True)
    return newest


def compare(workdir: str, local: Path, *, processes: int, devices: int, kills: list[bool]) -> int:
    """Interrupt a run in a bucket, with kill -9 or SIGTERM; return how many values differ from a run on disk."""

    def start_run(where: str = workdir) -> list[subprocess.Popen]:
        return start(where, processes=processes, devices=devices)

    newest = 0
    for kill in kills:
        newest = interrupt(start_run, workdir, after=newest, kill=kill)
    finish(start_run())
    finish(start_run(str(local)))
    expected, found = read_run(local), read_run(epath.Path(workdir))
    differences = find_differences(expected, found)
    evaluated = json.loads(finish(start(workdir, processes=1, devices=devices, mode="eval")))
    wrong = [
        name
        for name in ("eval/top1", "eval_ema/top1", "eval/count")
        if evaluated[name] != expected[f"{name} of step {STEPS}"]
    ]
    print(f"{workdir}: {len(found)} values, {len(differences)} differ from the run on disk {differences[:5] or ''}")
    print(f"{workdir}: evaluated on one process, {len(wrong)} values differ {wrong or ''}", flush=True)
    return len(differences) + len(wrong)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code, 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("gs", "s3"), help="one kind of bucket; default: both")
    flags = parser.parse_args(argv)
    # This process must see the checkpoints that others write, and not its first listing again.
    fsspec.config.conf.update({name: {"use_listings_cache": False} for name in ("gs", "gcs", "s3")})
    cases = {"gs": (emulate_gcs, 2, 4, [False, True]), "s3": (emulate_s3, 1, 1, [True])}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for scheme, (emulate, processes, devices, kills) in cases.items():
            if flags.only not in (None, scheme):
                continue
            if missing := list_missing(scheme):
                print(f"{scheme}:// needs {', '.join(missing)}; docs/training.md says what to install", file=sys.stderr)
                return 2
            url = stack.enter_context(emulate())
            wrong += compare(
                f"{url}/runs/mine", Path(folder) / scheme, processes=processes, devices=devices, kills=kills
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
