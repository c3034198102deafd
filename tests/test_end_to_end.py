"""The whole job on the real model and real data, small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gradpursuit.cli import main
from gradpursuit.quickstart.assets import cache_folder
from gradpursuit.quickstart.build import build
from gradpursuit.store import GradientStore

FAMILIES = ("arithmetic", "object_counting", "qa_wikidata", "word_unscrambling")
ROWS = 12


@pytest.mark.real_model
def test_real_model_on_a_small_pool(smollm2_path: Path, tmp_path: Path) -> None:
    build(cache_folder(), tmp_path)
    pool = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text("utf-8").splitlines()]
    pool = [row for row in pool if row["family"] in FAMILIES and "duplicate_of" not in row]
    pool = pool[:: len(pool) // ROWS][:ROWS]
    pool += [{**row, "id": f"{row['id']}-copy"} for row in pool]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool), "utf-8")
    for name in ("target", "heldout"):
        lines = (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:8]), "utf-8")
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(smollm2_path)},
        "data": {
            "deduplicate": "none",  # how the strategies treat copies is looked at
            **{name: str(tmp_path / f"{name}.jsonl") for name in ("pool", "target", "heldout")},
        },
        "warmup": {"fraction": 0.4, "epochs": 1, "checkpoints": 2},
        "gradients": {"shard_rows": ROWS},
        "selection": {"strategies": ["gtp", "less"], "k": 6},
        "evaluation": {"seeds": 1, "epochs": 3, "batch_size": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert main(["run", str(tmp_path / "config.yaml")]) == 0

    store = GradientStore.open(tmp_path / "run/gradients/pool/adam-symmetric")
    features = [np.concatenate(shards) for shards in store.features()]
    for t, rows in enumerate(features):
        kept = np.linalg.norm(rows, axis=1) / store.column("norm")[t]
        assert abs(kept - 1).max() < 0.15, "the sketch keeps norms to about 1/√d"
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        copies = (unit[:ROWS] * unit[ROWS:]).sum(axis=1)
        assert copies.min() > 0.999, "an exact copy has the gradient of its original"
    ids = {}
    for name in ("gtp", "less"):
        text = (tmp_path / "run/selection" / name / "selected.jsonl").read_text("utf-8")
        ids[name] = [json.loads(line)["id"].removesuffix("-copy") for line in text.splitlines()]
        assert len(ids[name]) == 6
    assert len(set(ids["gtp"])) == 6, "the pursuit takes no example twice"
    assert len(set(ids["less"])) < 6, "top-k takes copies"
    report = json.loads((tmp_path / "run/report.json").read_text("utf-8"))
    loss = {line["strategy"]: line["mean"] for line in report["comparison"]["rows"]}
    before = report["comparison"]["before"]
    assert loss["gtp"] < before - 0.5, "fine-tuning on the chosen rows helps the target"
