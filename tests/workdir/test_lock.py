import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from mobilenet_jax.workdir import lock
from mobilenet_jax.workdir.lock import LEASE_FILE, LOCK_FILE, LockedError, lock_workdir

HOLD = """
import sys, time
from etils import epath
from mobilenet_jax.workdir.lock import lock_workdir
with lock_workdir(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def has_no_locks(monkeypatch) -> None:
    """Have the file system answer as one without locks does, and leases end fast."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    monkeypatch.setattr(lock, "RENEW", 0.1)
    monkeypatch.setattr(lock, "LEASE", 1.0)


@pytest.fixture(params=["lock", "lease"])
def workdir(request, tmp_path, monkeypatch) -> epath.Path:
    if request.param == "lease":
        has_no_locks(monkeypatch)
    return epath.Path(tmp_path / "run")


def test_the_second_is_refused_and_told_by_whom(workdir):
    with lock_workdir(workdir) as check:
        check()
        with (
            pytest.raises(LockedError, match=rf"run is in use: process {os.getpid()} on host {socket.gethostname()}"),
            lock_workdir(workdir),
        ):
            pass
        check()
    with lock_workdir(workdir):
        pass
    assert list(workdir.iterdir()) == []


def test_the_lock_ends_with_an_exception(workdir):
    with pytest.raises(KeyError), lock_workdir(workdir):
        raise KeyError
    assert list(workdir.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(LockedError, match=rf"process {holder.pid} on host"), lock_workdir(epath.Path(tmp_path)):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()
    with lock_workdir(epath.Path(tmp_path)):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_lease_that_nobody_renews_ends(tmp_path, monkeypatch):
    has_no_locks(monkeypatch)
    (tmp_path / LEASE_FILE).write_text('{"host": "gone", "pid": 7, "id": "1", "renewed": 0}')
    start = time.monotonic()
    with lock_workdir(epath.Path(tmp_path)) as check:
        assert time.monotonic() - start >= 1.0
        check()
        # A machine that slept is back, and has lost its lease.
        (tmp_path / LEASE_FILE).write_text('{"host": "other", "pid": 8, "id": "2", "renewed": 0}')
        time.sleep(0.5)
        with pytest.raises(LockedError, match="another run has taken over"):
            check()
    assert json.loads((tmp_path / LEASE_FILE).read_text())["host"] == "other"


def test_of_two_that_start_at_once_one_gets_the_lease(tmp_path, monkeypatch):
    has_no_locks(monkeypatch)
    (tmp_path / LEASE_FILE).write_text("left by a crash")
    outcomes, both = [], threading.Barrier(2)

    def start() -> None:
        both.wait()
        try:
            with lock_workdir(epath.Path(tmp_path)):
                outcomes.append("locked")
                time.sleep(1.0)
        except LockedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["locked", "refused"]
