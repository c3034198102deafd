"""The tree is clean: linter, formatter and type checker find nothing, and rooms import only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_tool_finds_nothing(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, *([] if command == ["mypy"] else ["."])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


ORDER = {
    name: level
    for level, names in enumerate(
        (
            ("errors", "progress", "durable", "shown", "__init__"),
            ("tree", "remote"),
            ("config", "files", "aside", "marker", "owner"),
            ("identity", "lock", "plugins", "hub", "sources", "sealed"),
            ("live",),
            ("manifest",),
            ("data",),
            ("trajectory",),
            ("store", "counting"),
            ("gradients",),
            ("pursuit",),
            ("features",),
            ("selection",),
            ("cluster",),
            ("spread",),
            ("evaluation",),
            ("inputs", "gradient_stage"),
            ("selection_problem",),
            ("comparison_stage", "export_stage"),
            ("report",),
            ("stages",),
            ("targets", "integrity", "file_check"),
            ("attempt", "belongings"),
            ("pipeline",),
            ("status", "console", "verify", "estimate", "opening"),
            ("quickstart", "export_verb"),
            ("cli",),
            ("__main__",),
        )
    )
    for name in names
}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "src" / "gradpursuit").with_suffix("").parts
    return parts[0]


def test_rooms_import_only_downwards() -> None:
    found = 0
    for path in (ROOT / "src" / "gradpursuit").rglob("*.py"):
        here = room(path)
        if here == "__init__":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gradpursuit."):
                other = node.module.split(".")[1]
                found += 1
                assert ORDER[other] <= ORDER[here], f"{path}: {here} imports {other}"
    assert found > 50


def test_pursuit_knows_no_model_and_no_files() -> None:
    for path in (ROOT / "src" / "gradpursuit" / "pursuit").glob("*.py"):
        imported = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert not imported & {"torch", "transformers", "pathlib", "os", "io"}, path
