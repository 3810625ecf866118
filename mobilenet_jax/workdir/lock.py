"""The lock of a workdir: one run at a time trains there.

A file on a disk is locked by the system, which releases it when the process ends, also on file systems that several
machines share. A bucket has no such locks. There the lock is a lease: an object that its owner renews while it lives.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mobilenet_jax.paths import is_bucket

LOCK_FILE = "run.lock"
LEASE_FILE = "run.lease"
RENEW = 10.0  # seconds between two renewals of a lease
LEASE = 60.0  # seconds without a renewal after which the owner counts as dead


class LockedError(OSError):
    """Another run holds the workdir, or has taken it over; the message is one sentence."""


@contextlib.contextmanager
def lock_workdir(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a workdir, which is created if it is missing. The first process holds it for all of them.

    Yields a function that raises LockedError if another run has taken the workdir over, which only a lease allows. Call
    it before anything that must not be written twice.

    Raises LockedError on all processes, with host and process of the owner, if another run holds the lock.
    """
    with contextlib.ExitStack() as stack:
        check, problem = _do_nothing, ""
        if jax.process_index() == 0:
            try:
                check = stack.enter_context(_lock(workdir / LOCK_FILE))
            except OSError as error:
                problem = str(error)
        if problem := _broadcast(problem):
            raise LockedError(problem)
        yield check


def _do_nothing() -> None:
    pass


def _broadcast(text: str) -> str:
    """Return the text of the first process, cut to 1,000 bytes, on all processes."""
    mine = np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine)).rstrip(b"\0").decode(errors="replace")


@contextlib.contextmanager
def _lock(path: epath.Path) -> Iterator[Callable[[], None]]:
    file = None if is_bucket(path) else _open_locked(path)
    if file is None:
        with _lease(path.with_name(LEASE_FILE)) as check:
            yield check
        return
    try:
        file.truncate(0)
        json.dump(_describe_owner(), file)
        file.flush()
        yield _do_nothing
    finally:
        path.unlink(missing_ok=True)  # while the lock is held, so that nobody locks a file that is about to go
        file.close()


def _open_locked(path: epath.Path) -> Any:
    """Return the locked file, or None if its file system has no locks. Raises LockedError if another run has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise _make_refusal(path, file.read()) from error
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            logging.warning("%s has no file locks (%s); the run renews a lease instead", path.parent, error.strerror)
            path.unlink(missing_ok=True)
            return None
        # The owner before may have removed the file between the opening and the locking.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def _lease(path: epath.Path) -> Iterator[Callable[[], None]]:
    system, name = fsspec.core.url_to_fs(str(path), use_listings_cache=False)
    mine = {**_describe_owner(), "id": uuid.uuid4().hex}
    _wait_for_end_of_lease(system, name, path)
    try:
        # Created only if there is none: of two runs that start at once, one is refused.
        if is_bucket(path):
            system.pipe_file(name, _encode(mine), mode="create")
        else:  # fsspec looks first and then writes
            with open(name, "xb") as file:
                file.write(_encode(mine))
    except FileExistsError as error:
        raise _make_refusal(path, _read(system, name)) from error
    end, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not end.wait(RENEW):
            try:
                if json.loads(_read(system, name) or "{}").get("id") != mine["id"]:
                    lost.set()
                    return
                system.pipe_file(name, _encode(mine))
            except Exception as error:  # the bucket may not answer for a while; each client raises its own kinds
                logging.warning("%s could not be renewed: %s", path, error)

    def check() -> None:
        if lost.is_set():
            raise LockedError(f"another run has taken over {path.parent}, because this one did not renew its lock")

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        end.set()
        thread.join()
        if not lost.is_set():
            system.rm_file(name)


def _wait_for_end_of_lease(system: Any, name: str, path: epath.Path) -> None:
    """Return when nobody holds a lease. Raises LockedError if the lease is renewed, which shows that its owner lives.

    Only this machine's clock counts, because the clocks of two machines may differ.
    """
    first = _read(system, name)
    if first is None:
        return
    logging.info("%s is there; waiting up to %g s to see whether its owner lives", path, LEASE)
    end = time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(RENEW / 5)
        now = _read(system, name)
        if now is None:
            return
        if now != first:
            raise _make_refusal(path, now)
    if _read(system, name) == first:  # no other run has just done this
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(name)


def _read(system: Any, name: str) -> str | None:
    try:
        return system.cat_file(name).decode()
    except FileNotFoundError:
        return None


def _encode(owner: dict) -> bytes:
    return json.dumps({**owner, "renewed": time.time()}).encode()


def _describe_owner() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _make_refusal(path: epath.Path, text: str | None) -> LockedError:
    try:
        owner = json.loads(text or "")
        who = f"process {owner['pid']} on host {owner['host']}"
    except (ValueError, KeyError, TypeError):  # the owner has not written its name yet
        who = "another process"
    return LockedError(f"{path.parent} is in use: {who} trains there; wait for its end or give another --workdir")
