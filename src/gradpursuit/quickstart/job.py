"""The quickstart as an ordinary run configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gradpursuit.config import RunConfig, apply_overrides, build_config
from gradpursuit.pipeline import check
from gradpursuit.quickstart.assets import MODEL, cache_folder, smollm2
from gradpursuit.quickstart.build import build


def quickstart_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Fetch model and data (once), build pool and target under `run_dir`, and configure the run.

    Raises:
        DownloadError: model or data cannot be fetched.
        RunError: the disk is full.
        ConfigError: an override is not usable.
    """
    tree = yaml.safe_load(SETTINGS)
    apply_overrides(tree, overrides)
    run_dir, cache = run_dir.resolve(), cache_folder()
    tree["run_dir"] = str(run_dir)
    tree["model"].setdefault("path", str(cache / MODEL))
    for name in ("pool", "target", "heldout"):
        tree["data"].setdefault(name, [str(run_dir / "input" / f"{name}.jsonl")])
    config = build_config(tree, "quickstart")  # refuses what is wrong before anything is fetched
    check(config)
    smollm2(cache)
    build(cache, run_dir / "input")
    return config


SETTINGS = """
model: {}
data:
  max_tokens: 256
warmup:
  fraction: 0.15
  epochs: 3
  checkpoints: 3
gradients:
  dim: 4096
  shard_rows: 64
selection:
  strategies: [gtp, less, random]
  k: 24
evaluation:
  seeds: 2
  epochs: 5
"""
