"""Command lines and run folders that somebody broke: one message on stderr, exit code above 0, nothing written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from breaking import in_time
from gradpursuit.cli import main

VERBS = ["run", "warmup", "collect", "select", "export", "compare", "status", "inspect", "report", "estimate", "verify"]
FOLDERS = ["target add", "target list"]
ODD = [
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "\x1b[2J",
        "\u202e",
        "-",
        "--",
        "---",
        "=",
        "--=",
        "--.",
        "--a.b.c=1",
        "--seed",
        "--seed=x",
    ),
    *("~nosuchuser", "loop", "loop/x", "/dev/null", "/dev/zero", ".", "..", "/", "file", "empty", "x" * 5000, "c.yaml"),
    *("--selection.k=0", "--selection.k=" + "9" * 5000, "--run-dir=file/x", "--run-dir=\0", "--run-dir=loop"),
    *("--run-dir=~nosuchuser", "--n=-1", "--n=" + "9" * 5000, "--sample=-5", "--sample=x", "--k=0", "--k=auto"),
    *("--tokens=-1", "--fraction=nan", "--min-per-source=a=b", "--max-per-source=inf", "--out=\0", "--repeats=-1"),
    *("--name=../x", "--name=\x1b", "--file=https://me:SECRETVALUE@host/x", "--model.path=https://me:SECRETVALUE@h/x"),
    *("--gradients.store=s3://a:SECRETVALUE@b/c", "--data.pool=[", "--data.pool={a: &x [*x]}", "--json", "--quiet"),
    *("--engine", "--engine=none", "--address=x", "--targets=,", "--nothing", "--data.pool.0=x", "--model=3"),
    "https://me:SECRETVALUE@host/c.yaml",
]


def test_broken_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets  # noqa: F401  # what is slow to import must not be taken for a hang
    import peft  # noqa: F401
    import upath  # noqa: F401

    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("{")
    (tmp_path / "empty").mkdir()
    for name, text in (("config.yaml", "model: [\n"), ("manifest.json", "[" * 50_000)):
        (tmp_path / "empty" / name).write_text(text)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for seed in range(200):
        made = random.Random(seed)
        words = made.choice(VERBS + FOLDERS).split() + [made.choice(ODD) for _ in range(made.randint(1, 3))]
        try:
            with in_time():
                code: object = main(words)
        except SystemExit as error:  # of argparse
            code = error.code
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {words}: {type(error).__name__}: {str(error)[:300]}") from error
        out, err = capsys.readouterr()
        assert code in (2, 1), (seed, words, code)
        assert err.count("error: ") >= 1, (seed, words, err)
        assert "Traceback" not in err, (seed, words)
        assert "SECRETVALUE" not in err + out, (seed, words, err)
        assert not set(out + err) & set("\x1b\0\u202e\ud800"), (seed, words)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
