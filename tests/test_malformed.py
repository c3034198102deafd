"""Configurations and flags that somebody broke: one message, no hang, nothing written. A failure names its seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from breaking import broken_bytes, in_time, refusal
from gradpursuit.config import RunConfig, load_config
from gradpursuit.errors import ConfigError
from gradpursuit.opening import read_config

CASES = 1000
VALUES: list[Any] = [
    1e300,
    -1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**30,
    10**400,
    -1,
    0,
    2**32,
    2**63,
    True,
    None,
    "",
    "\0",
    "no",
    "1e3",
    "0x",
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "~nosuchuser/x",
    "https://me:secret@host/x",
    "a" * 5000,
    "\ud800",
    "::",
    "!!binary",
    [1, 1],
    0.5,
    -0.0,
    5e-324,
    "null",
    "*",
    "/dev/zero",
    "\u202e",
    ["a", "a"],
]
TEXTS = [
    "",
    "\ufeff",
    "a",
    "[]",
    "- a",
    "a: b: c",
    "\tmodel:",
    "a: &a [*a]",
    "&a {a: *a}",
    "a: !!binary aGk=",
    "a: 2024-01-01",
    "a: !!python/object:os.system x",
    "a: !!bool x",
    "a: !!int ''",
    "a: !!timestamp x",
    "a: !!set {b}",
    "1: b",
    "? [a]\n: b",
    "a: 1\na: 2",
    "a: " + "[" * 20_000,
    "a: " + "{b: " * 3000,
    "a: 9" + "9" * 5000,
    "--- a\n--- b",
    "%YAML 9",
    "a: *b",
    "a: &x [1,1,1,1,1,1,1,1,1,1]\n"
    + "\n".join(f"a{i}: &x{i} [{','.join([f'*x{i - 1}' if i else '*x'] * 10)}]" for i in range(12)),
    "&a {<<: *a}",
    "a: \x00",
    "a: \x1b",
    "a: 1:2:3",
    "a: 99999-99-99",
]


def fields() -> list[str]:
    sections = {name: value.annotation for name, value in RunConfig.model_fields.items()}
    found = list(sections)
    for name, kind in sections.items():
        found += [f"{name}.{key}" for key in getattr(kind, "model_fields", {})]
    return [*found, "model.lora.r", "model.lora.alpha", "model.lora.target_modules", "nothing", "data.nothing", "a.b.c"]


def flag_of(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()


def test_broken_settings(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {pool: p.jsonl, target: t.jsonl}\n")
    refused = 0
    for seed in range(CASES):
        made = random.Random(seed)
        key, value = made.choice(fields()), made.choice(VALUES)
        flags = [f"{key}={flag_of(value)}"]
        message = refusal(lambda flags=flags: read_config(path, flags).dump(), f"seed {seed}, {flags[0][:200]!r}")
        refused += message is not None
        assert "secret" not in (message or ""), (seed, flags)
    assert refused > CASES / 2
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_broken_files(number: int, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TEXTS[number])
    with in_time(), pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(path)
    path.write_bytes(TEXTS[number].encode("utf-16"))
    with in_time(), pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(path)


def test_broken_bytes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    whole = b"model: {path: m, lora: {r: 8}}\ndata:\n  pool: [p.jsonl]\n  target: t.jsonl\nselection: {k: 5}\nseed: 1\n"
    for seed in range(400):
        path.write_bytes(broken_bytes(whole, random.Random(seed)))
        message = refusal(lambda: load_config(path), f"seed {seed}")
        assert message is None or "c.yaml" in message, seed


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("warmup.learning_rate=1e300", "warmup.learning_rate"),
        ("model.lora.r=" + "1" + "0" * 30, "model.lora.r"),
        ("gradients.nonzeros=1000000000", "gradients.nonzeros"),
        ("gradients.dim=1000000000", "gradients.dim"),
        ("evaluation.seeds=1000000", "evaluation.seeds"),
        ("seed=4294967296", "seed"),
        ("run_dir=~nosuchuser/x", "~nosuchuser"),
        ("data.chat_template_kwargs={day: 2026-01-01}", "day"),
    ],
)
def test_bounds(flag: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {pool: p.jsonl, target: t.jsonl}\n")
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        read_config(path, [flag])


def test_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m}\ndata:\n  pool: p.jsonl\n  target: t.jsonl\n  max_tokens: many\nwarmup: {epocs: 2}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"{path}:5: 'data.max_tokens' = 'many': ")
    assert second.startswith(f"{path}:6: unknown key 'epocs' in section 'warmup'; did you mean 'epochs'?")


def test_a_number_of_many_digits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{path: m}}\nseed: {'9' * 5000}\n")
    with pytest.raises(ConfigError, match="line 2: a number of 5,000 digits, which no setting is"):
        load_config(path)


@pytest.mark.parametrize(("text", "meant"), [("010", "8"), ("1:30", "90")])
def test_numbers_that_are_not_what_they_look_like(text: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{path: m}}\nseed: {text}\n")
    with pytest.raises(ConfigError, match=f"line 2: YAML reads {text} as {meant}"):
        load_config(path)
