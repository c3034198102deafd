"""A real browser without a window, driven by the DevTools protocol: Chromium, or the Chromium inside Qt WebEngine.

Qt WebEngine comes with the test extra as a wheel, so it is there wherever the tests are; a Chromium on the machine is
used beside it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import websocket

QT = """
import sys
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
app = QApplication(sys.argv)
view = QWebEngineView()
view.setUrl("about:blank")
view.show()
app.exec()
"""
KEYS = {"Tab": 9, "Enter": 13}
START = 60.0  # seconds that a browser may take to start


class Browser:
    """One page of a running browser.

    Attributes:
        troubles: errors and warnings that the page wrote, scripts that failed, policies that were violated.
        requests: addresses that the page asked for.
        scripts: whether scripts of the page run.
    """

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=START)
        self._number, self.scripts = 0, True
        self.troubles: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; what happens meanwhile is noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message}"
                result: dict[str, Any] = message["result"]
                return result

    def open(self, path: Path, width: int = 1200, dark: bool = False) -> None:
        """Load a file in a window of that width, in light or dark; returns when it is drawn."""
        self.troubles.clear()
        self.requests.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        if self.scripts:
            self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def allow_scripts(self, allowed: bool) -> None:
        """Whether scripts of the page run from the next page on."""
        self.scripts = allowed
        self.call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == "Enter":
            code["text"] = "\r"
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **code)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """What is seen, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """Leave the page."""
        self._socket.close()

    def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv())
        kind, what = message.get("method", ""), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.troubles.append(what["exceptionDetails"].get("exception", {}).get("description", str(what)))
        elif kind == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.troubles.append(str([argument.get("value") for argument in what["args"]]))
        elif kind == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.troubles.append(what["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        return message


def chromium() -> str | None:
    """A Chromium or Chrome of the machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


def qt_trouble() -> str:
    """Why Qt WebEngine cannot start here, such as a library that the system lacks; empty if it can."""
    command = [sys.executable, "-c", "import PySide6.QtWebEngineWidgets"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


@contextmanager
def browser(engine: str, profile: Path) -> Iterator[Browser]:
    """A browser of its own, `chromium` or `qt`, and its page; both are gone after the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if engine == "chromium":
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        command = [str(chromium()), *flags, f"--remote-debugging-port={port}", "about:blank"]
        environment = dict(os.environ)
    else:
        command = [sys.executable, "-c", QT]
        environment = {
            **os.environ,
            "QT_QPA_PLATFORM": "offscreen",
            "QTWEBENGINE_DISABLE_SANDBOX": "1",
            "QTWEBENGINE_REMOTE_DEBUGGING": str(port),
        }
    with (profile / "browser.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        made = Browser(_page(port, process, profile / "browser.log"))
        yield made
        made.close()
    finally:
        process.terminate()
        process.wait(timeout=START)


def _page(port: int, process: subprocess.Popen[bytes], log: Path) -> str:
    """The address of the page, as soon as the browser has one."""
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START) as answer:
                pages = [page for page in json.loads(answer.read()) if page["type"] == "page"]
        except OSError:
            pages = []
        if pages:
            return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError(f"the browser did not start: {log.read_text()}")
