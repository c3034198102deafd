"""Parts of a report that cannot be given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run


class AbsentError(Exception):
    """A part of the report cannot be given yet, or not without being asked: why, and the command that mends it."""

    def __init__(self, why: str, command: str = "") -> None:
        super().__init__(why)
        self.why, self.command = why, command

    def to_json(self) -> dict[str, str]:
        """In place of the part."""
        return {"missing": self.why, "command": self.command}


def require(run: Run, stage: str) -> None:
    """See that everything up to `stage` is complete.

    Raises:
        AbsentError: it is not.
    """
    if lacking := run.missing(stage):
        why = run.damage(lacking) or f"'{lacking.name}' is not complete for this configuration"
        raise AbsentError(why, f"gradpursuit {lacking.verb} {run.folder}")
