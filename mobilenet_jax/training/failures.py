"""The watch over the processes of a run: if one fails, all end, with its reason."""

import itertools
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from absl import logging
from jax._src import distributed  # the key-value store of the processes has no public name

_START = 300  # seconds for which the others wait until process 0 listens
_FINISH = 600  # seconds for which a process that has finished waits for the others
_GRACE = 2  # seconds in which the reason of another process may arrive
_KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}  # a machine without power is gone after 40 s
_LOST = ("Gloo", "UNAVAILABLE", "Connection reset", "Connection closed")  # in errors of a collective without its peer
_AGAIN = "the same command on every host continues from the last checkpoint"
_DONE = "done\n"
_contexts = itertools.count()
_entered: "list[FailureWatch]" = []


class FailureWatch:
    """Within this context, a process that fails or disappears ends all processes of the run.

    Otherwise the other processes would wait in a collective operation until a timeout of JAX aborts them without a
    reason. Process 0 holds a connection to each other process. A process that leaves the context with an exception
    sends its reason to process 0, which sends it on to all; each prints the reason and ends with the same exit code. A
    connection that breaks without a reason means that the process was killed. The watch does nothing for a single
    process.

    Args:
      exit_codes: {kind of exception: exit code} of the exceptions whose message says everything. Any other exception
        is printed with its traceback and ends the run with exit code 1.
    """

    def __init__(self, exit_codes: Mapping[type[BaseException], int]):
        self._exit_codes = exit_codes
        self._client: Any = distributed.global_state.client if distributed.global_state.num_processes > 1 else None
        self._process = distributed.global_state.process_id
        self._keys = f"mobilenet_jax/failures/{next(_contexts)}"  # every process makes its contexts in the same order
        self._connections: list[socket.socket] = []
        self._ending = threading.Lock()

    def __enter__(self) -> "FailureWatch":
        _entered.append(self)
        if self._client and self._process == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
            token = secrets.token_hex()
            self._client.key_value_set(f"{self._keys}/listens", f"{server.getsockname()[1]} {token}")
            _start_thread(self._accept, server, token)
        elif self._client:
            port, token = self._client.blocking_key_value_get(f"{self._keys}/listens", 1000 * _START).split()
            self._connect(int(port), token)
        return self

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        _entered.remove(self)
        if not self._client:
            return
        if error is not None:
            self._fail(error)
        # A process that went on to JAX's own exit would no longer hear of the others.
        self._client.wait_at_barrier(f"{self._keys}/finished", 1000 * _FINISH)
        self._send(_DONE)

    def _accept(self, server: socket.socket, token: str) -> None:
        """Take the connections of all other processes. One that does not know the token is none of them."""
        missing = distributed.global_state.num_processes - 1
        with server:
            while missing:
                connection, _ = server.accept()
                connection.settimeout(_GRACE)
                try:
                    said, _, process = connection.makefile().readline(200).strip().partition(" ")
                except (OSError, UnicodeDecodeError):
                    said, process = "", ""
                if said != token:
                    connection.close()
                    continue
                missing -= 1
                self._hold(connection, int(process))

    def _connect(self, port: int, token: str) -> None:
        """Connect to process 0."""
        host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
        try:
            connection = socket.create_connection((host, port), timeout=10)
        except OSError as error:
            logging.warning(
                "port %d of process 0 on %s cannot be reached (%s): if another process fails, this one ends only after "
                "a timeout of JAX, without a reason",
                port,
                host,
                error,
            )
            return
        connection.sendall(f"{token} {self._process}\n".encode())
        self._hold(connection, 0)

    def _hold(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on macOS
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections.append(connection)
        _start_thread(self._listen, connection, process)

    def _listen(self, connection: socket.socket, process: int) -> None:
        """Wait for the only line that another process sends: that it has finished, or why it ends."""
        try:
            line = connection.makefile().readline()
        except OSError:
            line = ""
        if line != _DONE:
            gone = [f"process {process} was killed, or its machine is gone", 1]
            self._end(*(json.loads(line) if line.endswith("\n") else gone))

    def _fail(self, error: BaseException) -> NoReturn:
        """End this process for an exception, and tell the others."""
        code = next((code for kind, code in self._exit_codes.items() if isinstance(error, kind)), None)
        reason = str(error) or type(error).__name__
        if any(word in reason for word in _LOST):
            # The other process has said why, or its connection breaks: the thread that listens ends this process.
            time.sleep(_GRACE)
        elif code is None:
            traceback.print_exception(error)
        self._end(f"process {self._process} on {socket.gethostname()} failed: {reason}", 1 if code is None else code)

    def _end(self, reason: str, code: int) -> NoReturn:
        """Tell the other processes the reason, print it, and end this process. Only its first thread gets here."""
        self._ending.acquire()
        self._send(json.dumps([reason, code]) + "\n")
        print(f"{reason}; {_AGAIN}" if code == 1 else reason, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # the workers of the loader, which os._exit would leave behind
            child.terminate()
        # The usual way out would wait for the other processes, and for threads that are in a collective operation.
        os._exit(code)

    def _send(self, line: str) -> None:
        for connection in self._connections:
            try:
                connection.sendall(line.encode())
            except OSError as error:  # it ended first
                logging.debug("%s was not sent: %s", line, error)


def report_failure(error: BaseException) -> None:
    """End all processes for an exception now, because cleaning up may wait for the other processes.

    This returns if there is a single process or no watch.
    """
    for watch in _entered:
        if watch._client:
            watch._fail(error)


def _start_thread(function: Any, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="failures", daemon=True).start()
