"""What a run is made of: the files of its data, and a trajectory that it was given.

What was made of them stays in the run folder, so later stages go on when they are gone: then they count as they were.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path

from gradpursuit.config import RunConfig
from gradpursuit.errors import ConfigError
from gradpursuit.manifest import Manifest
from gradpursuit.sources import content_hashes, gone_note, missing_note, stamp

logger = logging.getLogger("gradpursuit")
SPLITS = ("pool", "target", "heldout")


class Inputs:
    """The inputs of a run.

    Args:
        config: of the run.
        folder: of the run.
        manifest: of the run; tells what there was when a stage read it.
        quick: know files by name, size and time instead of reading them, and leave it to others to tell what is gone.
    """

    def __init__(self, config: RunConfig, folder: Path, manifest: Manifest, *, quick: bool = False) -> None:
        self.sources = {name: getattr(config.data, name) or [] for name in SPLITS}
        self.trajectory = config.warmup.trajectory
        self._template = config.data.chat_template
        self._folder, self._manifest, self._quick = folder, manifest, quick

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """sha256 of every input file, by split and path.

        That of a file that is gone is taken from the data stage, if it is finished; in a quick run also that of a file
        of the same size and time.

        Raises:
            RunError: a file cannot be read, and it is not known what was in it.
        """
        known = self._manifest.entry("data").get("detail", {})
        stamps = known.get("stamps", {}) if self._quick else {}
        found = content_hashes(self.sources, known.get("inputs", {}), stamps)
        self._tell(gone_note(found))
        return found

    def note(self, stage: str) -> str:
        """What there is to say of what is gone of the inputs of the stage."""
        if stage == "data":
            return gone_note(self.hashes)
        return missing_note(self.trajectory) if stage == "trajectory" else ""

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of every input file, which tell a quick look that it is still the same."""
        return {path: stamp(path) for hashes in self.hashes.values() for path in hashes}

    @cached_property
    def template(self) -> str:
        """sha256 of `data.chat_template`; of a file that is gone, as it was when the data stage read it; empty: none.

        Raises:
            ConfigError: the file cannot be read, and it is not known what was in it.
        """
        if self._template is None:
            return ""
        from gradpursuit.data.template_file import template_source

        try:
            return hashlib.sha256(template_source(self._template).encode()).hexdigest()
        except ConfigError:
            known: str = self._manifest.entry("data").get("detail", {}).get("template", "")
            if not known or Path(self._template).exists():
                raise
            return known

    @cached_property
    def trajectory_is_gone(self) -> bool:
        """Whether the trajectory that was given is not there any more, but what was made of it is."""
        detail = self._manifest.entry("trajectory").get("detail", {})
        return detail.get("given", []) == self.trajectory and self._tell(missing_note(self.trajectory))

    @cached_property
    def trajectory_hashes(self) -> dict[str, str]:
        """sha256 of every file of the trajectory that was given."""
        if self.trajectory_is_gone:
            return dict(self._manifest.entry("trajectory")["detail"]["inputs"])
        from gradpursuit.trajectory.imported import trajectory_hashes

        return trajectory_hashes(self.trajectory)

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Folders of the trajectory that was given; if it is gone, of what was made of it; if none was, none."""
        if self.trajectory_is_gone:
            count = len(self._manifest.entry("trajectory")["detail"]["checkpoints"])
            return [self._folder / "trajectory" / f"checkpoint-{t}" for t in range(1, count + 1)]
        if not self.trajectory:
            return []
        from gradpursuit.trajectory.imported import checkpoint_folders

        return checkpoint_folders(self.trajectory)

    def _tell(self, note: str) -> bool:
        """Whether there is anything to say; a quick look says it elsewhere."""
        if note and not self._quick:
            logger.info("note: %s", note)
        return bool(note)
