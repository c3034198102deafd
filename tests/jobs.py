"""Small runs for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


class Job:
    """Files and configuration of a small run; `path` is the YAML file."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.path = folder / "job.yaml"
        self.write("pool.jsonl", [self.row(i) for i in range(30)] + [{**self.row(3), "id": "copy-of-3"}])
        self.write("target.jsonl", [self.row(i, "times") for i in range(6)])
        self.write("heldout.jsonl", [self.row(i, "times") for i in range(6, 12)])
        self.tree: dict[str, Any] = {
            "run_dir": str(self.run_dir),
            "model": {"path": str(model), "device": "cpu", "precision": "float32"},
            "data": {
                **{name: str(folder / f"{name}.jsonl") for name in ("pool", "target", "heldout")},
                "deduplicate": "none",  # the copy of row 3 is there to be met by the strategies
            },
            "warmup": {"fraction": 0.4, "epochs": 2, "checkpoints": 2, "batch_size": 4, "learning_rate": 1e-2},
            "gradients": {"dim": 256, "shard_rows": 8},
            "selection": {"strategies": ["gtp", "less", "random"], "k": 5},
            "evaluation": {"seeds": 2, "epochs": 1, "batch_size": 2},
        }
        self.save()

    @staticmethod
    def row(number: int, word: str = "plus") -> dict[str, Any]:
        """A question with its answer; `topic` stands for any column of the user's own."""
        prompt = f"What is {number} {word} {number % 7}?"
        return {"id": f"{word}-{number}", "prompt": prompt, "completion": f"It is {number * 3}.", "topic": word}

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows as JSON Lines."""
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def save(self, **changes: Any) -> None:
        """Write the configuration, with `section=value` changes."""
        for section, value in changes.items():
            self.tree[section] = {**self.tree[section], **value} if isinstance(value, dict) else value
        self.path.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
