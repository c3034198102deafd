"""What the README shows is true: its Python example runs, its configuration is one, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gradpursuit.cli import STAGE_VERBS
from gradpursuit.config import RunConfig, build_config, load_config
from gradpursuit.selection import STRATEGIES, check_strategies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def block(language: str, containing: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1
    return str(found[0])


def test_python_example_recovers_what_was_planted(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python", "GradientTrajectoryPursuit"), "README.md", "exec"), {})
    first, error = capsys.readouterr().out.splitlines()
    assert first.startswith("True ")
    assert float(error) < 1e-6


def test_configurations_are_valid_and_the_example_shows_the_defaults() -> None:
    build_config(yaml.safe_load(block("yaml", "model:")), "README.md")
    path = ROOT / "examples" / "config.yaml"
    example = load_config(path)
    assert set(yaml.safe_load(path.read_text("utf-8"))) == set(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        if name in ("run_dir", "model", "data", "selection"):
            continue
        assert getattr(example, name) == field.default, name
    for section in ("model", "data", "selection"):
        shown = getattr(example, section)
        free = {name: getattr(shown, name) for name in ("path", "pool", "target", "fraction") if hasattr(shown, name)}
        if section == "selection":
            free.pop("target")
        assert shown == type(shown)(**free), section
    assert set(yaml.safe_load(path.read_text("utf-8"))["evaluation"]) == set(type(example.evaluation).model_fields)


def test_the_combinations_shown_are_strategies() -> None:
    shown = yaml.safe_load(block("yaml", "options:"))["selection"]
    tree = {"model": {"path": "m"}, "data": {"pool": "p", "target": "t"}, "selection": shown}
    check_strategies(build_config(tree, "README.md"))
    assert set(shown["options"]) < set(shown["strategies"])


def test_verbs_and_strategies_are_those_of_the_program() -> None:
    for verb in [*STAGE_VERBS, "run", "quickstart"]:
        assert f"gradpursuit {verb}" in README
    for name in STRATEGIES:
        assert f"| `{name}` |" in README
    assert (ROOT / ".ci" / "run").read_text().count('pip install -c constraints.txt -e ".[test]" && pytest') == 1
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README
