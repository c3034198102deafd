"""The quickstart as an ordinary run configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gradpursuit.config import RunConfig, build_config
from gradpursuit.opening import run_place
from gradpursuit.pipeline import Run, check
from gradpursuit.quickstart.assets import MODEL, cache_folder, smollm2
from gradpursuit.quickstart.build import build
from gradpursuit.tree import apply_overrides


def quickstart_config(run_dir: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Configure the run; nothing is fetched or written yet.

    Raises:
        ConfigError: an override is not usable.
    """
    tree = yaml.safe_load(SETTINGS)
    apply_overrides(tree, overrides)
    folder = run_place(run_dir)
    tree["run_dir"] = str(folder)
    tree["model"].setdefault("path", str(cache_folder() / MODEL))
    for name in ("pool", "target", "heldout"):
        tree["data"].setdefault(name, [str(folder / "input" / f"{name}.jsonl")])
    config = build_config(tree, "quickstart", overrides)  # refuses what is wrong before anything is fetched
    check(Run(config))
    return config


def fetch_inputs(run_dir: Path) -> None:
    """Fetch model and data (once), and build pool, target and held-out files in `run_dir/input`.

    Raises:
        DownloadError: model or data cannot be fetched.
        RunError: the disk is full.
    """
    smollm2(cache_folder())
    build(cache_folder(), run_dir / "input")


SETTINGS = """
model: {}
data:
  max_tokens: 256
  deduplicate: none  # the pool's copies stay, to be seen by the strategies
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
  endpoints: [base]
"""
