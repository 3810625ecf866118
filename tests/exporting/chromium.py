"""A headless Chromium, driven through its DevTools protocol over a pipe, and a server for its pages."""

import base64
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_WAIT = 90  # seconds; a busy machine starts Chromium in ten
_FLAGS = (
    *("--headless=new", "--disable-gpu", "--disable-extensions", "--no-first-run", "--remote-debugging-pipe"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera that shows a clock
)


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page of a browser whose process reads commands from one pipe and answers on another."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers, self._buffer, self._number, self._session = commands, answers, b"", 0, None
        self.messages: list[str] = []  # what the page wrote to the console, and its exceptions
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """Return the result of a command of the protocol."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(json.dumps(message["params"]))

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], _WAIT)
            assert ready, "Chromium does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _WAIT
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not become true; the page said {self.messages}"
            time.sleep(0.1)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=address)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an input, as a person does in the dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key: str, code: int) -> None:
        """Press and release a key; `code` is its Windows virtual key code."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int, *, scale: float = 1, dark: bool = False) -> None:
        """Show the page on a screen of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def take_picture(self) -> bytes:
        """Return the whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def open_page(chromium: str, profile: Path) -> Iterator[Page]:
    """Give an empty page of a new browser, and end the browser. `profile` is a folder for its data."""
    for_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    # The protocol's pipes are the descriptors 3 and 4. spawn, because a fork is not safe beside JAX's threads.
    # First both go to numbers that cannot be overwritten.
    actions: list[tuple] = [
        (os.POSIX_SPAWN_DUP2, for_browser, 63),
        (os.POSIX_SPAWN_DUP2, from_browser, 64),
        (os.POSIX_SPAWN_DUP2, 63, 3),
        (os.POSIX_SPAWN_DUP2, 64, 4),
        (os.POSIX_SPAWN_CLOSE, 63),
        (os.POSIX_SPAWN_CLOSE, 64),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
    ]
    assert for_browser < 63
    assert from_browser < 63
    flags = [*_FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    process = os.posix_spawn(chromium, [chromium, *flags], os.environ, file_actions=actions, setsid=True)
    os.close(for_browser)
    os.close(from_browser)
    try:
        yield Page(commands, answers)
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(commands)
        os.close(answers)


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep the log of requests out of the tests' output."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Give the address of a server of a folder, as `python -m http.server` is one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
