"""What people see on a terminal, and what programs get from a pipe."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradpursuit.cli import _parser, main
from gradpursuit.console import ended_as_by_ctrl_c
from jobs import Job

WORK = """
import logging, sys
from gradpursuit.console import console
from gradpursuit.progress import Progress, listening
logger = logging.getLogger("gradpursuit")
logger.setLevel(logging.DEBUG)
with console(quiet="quiet" in sys.argv), listening(lambda work: None):
    logger.info("pursuit iteration 3", extra={"progress": True})
    logger.warning("a [bold] word")
    with Progress("gradients of the pool", 100, "rows") as work:
        for _ in range(4):
            work.update(25)
            work._show()
    logger.info("gtp: done")
"""


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal of 100 columns gets to see of some work."""
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=writing,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(writing)
    seen = b""
    while True:
        try:
            piece = os.read(reading, 65536)
        except OSError:  # the terminal's way to say that nobody writes any more
            break
        if not piece:
            break
        seen += piece
    os.close(reading)
    assert process.wait(timeout=60) == 0, seen
    return seen.decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-9]|9[0-7])(?:;\d+)*m")
CURSOR = re.compile(r"\x1b\[\??[\d;]*[A-Za-z]")


def test_a_terminal_shows_bars_and_keeps_the_words() -> None:
    seen = on_a_terminal()
    assert COLOUR.search(seen)
    plain = CURSOR.sub("", seen)
    assert "pursuit iteration 3" in plain
    assert "warning: a [bold] word" in plain
    assert re.search(r"gradients of the pool [━╸╺ ]+ *50/100 rows", plain)
    assert "gradients of the pool: 100 rows in" in plain
    assert plain.rstrip().endswith("gtp: done"), "no bar is left behind"
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h"), "the cursor is back"


def test_no_color_is_respected() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert not COLOUR.search(seen)
    assert "50/100 rows" in CURSOR.sub("", seen)


def test_a_dumb_terminal_and_a_file_get_plain_lines() -> None:
    assert "\x1b" not in on_a_terminal(TERM="dumb")
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[:2] == ["pursuit iteration 3", "warning: a [bold] word"]
    assert lines[-1] == "gtp: done"


def test_quiet_leaves_warnings() -> None:
    assert on_a_terminal("quiet").strip() == "warning: a [bold] word"


def test_a_run_tells_people_on_stderr_and_programs_on_stdout(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["warmup", str(job.path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{job.run_dir}\n"
    assert f"next     gradpursuit collect {job.run_dir}" in printed.err
    assert f"written  {job.run_dir / 'data'}\n" in printed.err

    assert main(["collect", str(job.run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(job.run_dir)
    assert found["files"] == [str(job.run_dir / "gradients")]
    assert found["next"] == f"gradpursuit select {job.run_dir}"

    assert main(["select", str(job.run_dir), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{job.run_dir}\n"
    assert all(line.startswith("warning: ") for line in printed.err.splitlines())
    assert main(["export", str(job.run_dir), "-q", "--json"]) == 0
    printed = capsys.readouterr()
    wanted = [str(job.run_dir / f"selection/{name}/selected.jsonl") for name in ("gtp", "less", "random")]
    assert json.loads(printed.out)["files"] == wanted
    assert printed.err == ""
    assert main(["compare", str(job.run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["strategy"] for line in found["comparison"]] == ["gtp", "less", "random", "full"]
    assert found["seconds"]["evaluation"] > 0
    assert found["files"][:3] == wanted
    assert [Path(path).name for path in found["files"][3:]] == ["evaluation", "report.html", "report.json"]
    assert found["next"] == f"python -m webbrowser {(job.run_dir / 'report.html').as_uri()}"

    for verb in (["status"], ["verify", "--sample", "1"], ["target", "list"], ["report"]):
        assert main([*verb, str(job.run_dir), "--json"]) == 0
        json.loads(capsys.readouterr().out)


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in nested for verb in action.choices.values() for leaf in leaves(verb)] or [parser]


def test_every_verb_can_be_quiet_and_speak_json() -> None:
    verbs = leaves(_parser())
    assert len(verbs) >= 12
    for verb in verbs:
        assert {"--json", "--quiet", "-q"} <= set(verb._option_string_actions), verb.prog


def test_what_the_data_hold_does_not_steer_terminal_or_log(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**Job.row(i), "id": f"{i}\x1b]0;x\x07\nwarning: forged \u202e"} for i in range(12)]
    rows += [{"id": "13\x1b[2J", "prompt": "no answer\x9b"}]
    (job.folder / "po\x1b[31mol\u202e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.save(data={"pool": str(job.folder / "po\x1b[31mol\u202e.jsonl")})
    assert main(["inspect", str(job.path), "--n", "3"]) == 0
    out, err = capsys.readouterr()
    assert main(["inspect", str(job.path), "--json"]) == 0
    seen = out + err + capsys.readouterr().out
    assert not set(seen) & set("\x1b\x07\x9b\u202e")
    assert "po\\x1b[31mol\\u202e.jsonl" in err
    assert not [line for line in (out + err).splitlines() if line.startswith("warning: forged")]


def test_secrets_in_commands_are_not_repeated(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--model.path", "--data.pool", "--gradients.store", "--run-dir", "--selection.target", "--no.thing"):
        assert main(["inspect", str(job.path), flag, "https://me:SECRETVALUE@host/x"]) == 2
        assert "SECRETVALUE" not in "".join(capsys.readouterr())


def test_an_interruption_that_a_callback_swallows_comes_again() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt  # as Ctrl-C does while numba's compiler calls back

    hook, start = sys.unraisablehook, time.monotonic()
    with ended_as_by_ctrl_c():
        ctypes.CFUNCTYPE(None)(interrupted)()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
    assert time.monotonic() - start < 10
    assert sys.unraisablehook is hook
