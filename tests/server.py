"""A process that has loaded the libraries once and runs the command line in forks of itself.

Each fork is a process of its own that can be stopped and killed like any other; only the seconds of importing torch
and of compiling are shared. One JSON request a line on stdin, one JSON answer a line on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Server:
    """The test's end: starts the process on first use."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: list[str], printed: Path, largest_file: int | None = None, dies_in: str = "") -> Command:
        """Begin `gradpursuit ARGUMENTS`; what it prints goes to the file `printed`.

        dies_in: a stage that kills its process when all its files are there and the manifest does not say so yet.
        """
        pid = self._ask({"start": arguments, "printed": str(printed), "largest_file": largest_file, "dies": dies_in})
        return Command(self, pid, printed)

    def here(self, arguments: list[str]) -> int:
        """Run `gradpursuit ARGUMENTS` in the process itself: what it loads and compiles is there for the forks."""
        code: int = self._ask({"here": arguments})
        return code

    def wait(self, pid: int) -> int:
        """Exit code, or minus the signal that ended it."""
        code: int = self._ask({"wait": pid})
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Command:
    """A command at work."""

    def __init__(self, server: Server, pid: int, printed: Path) -> None:
        self.pid, self._server, self._printed = pid, server, printed

    def is_alive(self) -> bool:
        """Whether it has not ended; one that has is a zombie until it is waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code and everything it printed."""
        code = self._server.wait(self.pid)
        return code, self._printed.read_text()


def serve() -> None:
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    import gradpursuit.gradients.collector
    import gradpursuit.pipeline
    import gradpursuit.trajectory.warmup  # noqa: F401
    from gradpursuit.cli import main

    _settle()
    for line in sys.stdin:
        request = json.loads(line)
        if "here" in request:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
                answer = main(request["here"])
            _settle()
        elif "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _run(main, request)
        print(json.dumps(answer), flush=True)


def _settle() -> None:
    """What is there stays: no fork is to look through it for garbage."""
    gc.collect()
    gc.freeze()


def _run(main: Any, request: dict[str, Any]) -> None:
    printed = os.open(request["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    if request["dies"]:
        _die_in(request["dies"])
    sys.argv = ["gradpursuit", *request["start"]]
    code = 1
    try:
        code = main(request["start"])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _die_in(stage: str) -> None:
    from gradpursuit.manifest import Manifest

    complete = Manifest.complete

    def dying(manifest: Manifest, name: str, *rest: Any) -> None:
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        complete(manifest, name, *rest)

    Manifest.complete = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
