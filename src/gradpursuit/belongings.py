"""What is the user's and what is the run's: nothing of the user's is emptied, moved or overwritten."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gradpursuit.errors import ConfigError, RunError

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run
    from gradpursuit.stages import Stage

OWN_FOLDERS = ("data", "trajectory", "gradients", "selection", "evaluation", "targets", "exports")


def refuse_foreign(run: Run, stage: Stage) -> None:
    """See that nothing lies where a stage writes that the run never wrote.

    Raises:
        RunError: something does.
    """
    if stage.keep == "always" or run.manifest.entry(stage.name):
        return
    for path in [*run.paths(stage.owns), *run.paths(stage.writes)]:
        if os.path.lexists(path):
            raise RunError(
                f"{path}: is there already, and manifest.json does not say that this run wrote it; nothing was "
                "changed. Move it elsewhere, or choose another run folder"
            )


def refuse_inputs_within(run: Run) -> None:
    """Refuse inputs that lie where the run writes: it would replace them.

    Raises:
        ConfigError: one does.
    """
    config = run.config
    sources = {f"data.{name}": getattr(config.data, name) or [] for name in ("pool", "target", "heldout")}
    named = [(name, source.path) for name, found in sources.items() for source in found]
    named.append(("model.path", config.model.path))
    named += [("warmup.trajectory", path) for path in config.warmup.trajectory]
    root = run.folder.resolve()
    for name, text in named:
        place = Path(text)
        if not place.is_absolute() or not place.is_relative_to(root):
            continue
        inside = place.relative_to(root).parts
        if not inside or inside[0] in OWN_FOLDERS or inside[0] in ("report.html", "report.json"):
            raise ConfigError(f"{name}: {text} lies where the run writes; copy it elsewhere, or use another run_dir")
