"""A worker of the loader, or the process that started the workers, is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
CODE = """
import multiprocessing, os, signal, sys
from configs import base
from mobilenet_jax.data import loader

if __name__ == "__main__":
    config = base.get_config().data
    config.update(batch_size=150, workers=2)
    iterator = loader.make_train_iterator(config, seed=0, process_index=0, process_count=1)
    next(iterator)
    workers = [child.pid for child in multiprocessing.active_children()]
    print(os.getpid(), *workers, flush=True)
    if sys.argv[1] == "wait":
        sys.stdin.read()
    os.kill(workers[1], signal.SIGKILL)
    try:
        while True:
            next(iterator)
    except ChildProcessError as error:
        print(error, file=sys.stderr)
    iterator.set_state({**iterator.get_state(), "next_batch": 0})  # starts new workers
    next(iterator)
    iterator.close()
    assert not multiprocessing.active_children()
"""
pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system does not list its shared memory")


def start(argument: str) -> tuple[subprocess.Popen, list[int]]:
    """Start the code; return the process, and the ids of it and its workers when they work."""
    running = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CODE, argument],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout
    return running, [int(word) for word in running.stdout.readline().split()]


def list_left(pids: list[int]) -> list[str]:
    """The processes that still run, and the shared memory that their loader left."""
    blocks = [path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(f"mnj_{pids[0]}_")]
    return blocks + [str(pid) for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # it has ended, and nobody has asked how


def test_a_killed_worker_is_one_sentence_and_leaves_nothing_behind():
    running, pids = start("kill")
    said = running.communicate(timeout=300)[1]
    assert running.returncode == 0
    assert said == (
        "a worker of the loader was killed (exit code -9), perhaps because memory ran out; fewer "
        "data.workers need less memory\n"
    )
    assert list_left(pids) == []


def test_workers_end_with_the_process_that_started_them():
    running, pids = start("wait")
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 60
    while list_left(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list_left(pids) == []
    running.communicate(timeout=60)
