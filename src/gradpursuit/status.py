"""How far a run is: states, rows done, rate and time left of every stage, without loading a model or changing a file.

What a stage has finished is counted from its files; what the process at work is doing now is read from what it tells
(:mod:`gradpursuit.live`), and whether there is one, from the lock. Files are known by name, size and time of change:
`gradpursuit verify` and every stage that uses them look at each byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from gradpursuit.errors import GradPursuitError
from gradpursuit.gradient_stage import gradient_rows
from gradpursuit.integrity import told as damage_told
from gradpursuit.live import read_progress
from gradpursuit.lock import Owner, holder
from gradpursuit.progress import clock
from gradpursuit.stages import STAGES
from gradpursuit.targets import Target, targets

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        stage: its name.
        state: new, unfinished, running, outdated, damaged or complete.
        done, total, unit: rows, steps or cells; None where they are not known yet.
        rate: units a second of the process at work, else None.
        left: seconds left at that rate.
        seconds: taken when complete, so far when running.
        started: when it was last begun (ISO 8601, UTC).
        now: the part that is worked on (what, unit, done, total, rate, updated), else None.
        note: why the state could not be told from the inputs, or which of them are gone.
    """

    stage: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    rate: float | None = None
    left: float | None = None
    seconds: float | None = None
    started: str | None = None
    now: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A run folder: who is at work in it, its stages, the targets added to it."""

    folder: str
    owner: Owner | None
    stages: list[StageStatus]
    targets: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [f"run folder: {self.folder}", f"at work: {self.owner or 'nobody'}", ""]
        head = ("stage", "state", "done", "rate", "left", "seconds", "started (UTC)")
        lines += columns([head, *(_line(stage) for stage in self.stages)])
        lines += [f"now: {_now(stage.now)}" for stage in self.stages if stage.now]
        lines += [f"{stage.stage}: {stage.note}" for stage in self.stages if stage.note]
        if self.targets:
            lines += ["", *target_lines(self.targets)]
            lines += [f"now: {_now(target['now'])}" for target in self.targets if target["now"]]
        return "\n".join(lines)


def read_status(run: Run) -> RunStatus:
    """The status of a run, quickly (`Run(config, quick=True)`).

    Raises:
        RunError: the manifest is broken.
    """
    owner = holder(run.folder)
    entries = run.manifest.read()["stages"]
    stages, fingerprint, note = [], "", ""
    for stage in STAGES:
        entry = entries.get(stage.name, {})
        state = "new" if not entry else "outdated" if entry.get("state") == "complete" else "unfinished"
        earlier = note
        if not note:
            try:
                fingerprint = run.fingerprint_of(stage, fingerprint)
                state = run.state(stage, fingerprint)
            except GradPursuitError as error:  # an input cannot be read: what was made of it cannot be compared with it
                note = str(error)
        if owner and entry.get("state") == "running" and entry["started"] >= owner.since:
            state = "running"  # what began before the owner did was killed
        told = note if note != earlier else "" if note else run.inputs.note(stage.name)
        if state == "damaged" and not told:
            told = _damage(run, stage.name)
        stages.append(_stage(run, stage.name, state, entry, owner, told))
    return RunStatus(str(run.folder), owner, stages, [_target(target, owner) for target in targets(run)])


def _damage(run: Run, stage: str) -> str:
    """What a quick look can say of a damaged stage."""
    changed = [run.folder / name for name in run.manifest.changed(stage, quick=True)]
    return damage_told(changed, stage) if changed else f"rows are missing; `gradpursuit verify {run.folder}` names them"


def _target(target: Target, owner: Owner | None) -> dict[str, Any]:
    now = read_progress(target.folder.parent.parent, owner, f"target {target.name}") if owner else None
    return {**target.describe(), **({"state": "running"} if now else {}), "now": now}


def _stage(run: Run, name: str, state: str, entry: dict[str, Any], owner: Owner | None, note: str) -> StageStatus:
    seconds, started = entry.get("seconds"), entry.get("started")
    if state in ("new", "outdated"):
        return StageStatus(name, state, seconds=seconds, started=started, note=note)
    if state != "running" or owner is None:
        return StageStatus(name, state, *COUNTS[name](run, entry, None), seconds=seconds, started=started, note=note)
    now = read_progress(run.folder, owner, name)
    done, total, unit = COUNTS[name](run, entry, now)
    rate = _cell_rate(run) if name == "evaluation" else now["rate"] if now else None
    left = (total - done) / rate if rate and done is not None and total is not None else None
    seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(entry["started"])).total_seconds()
    return StageStatus(name, state, done, total, unit, rate, left, max(0.0, seconds), started, now, note)


Count = tuple[int | None, int | None, str]


def _rows_of_data(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
    if now:
        return now["done"], now["total"], now["unit"]
    kept = entry.get("detail", {}).get("rows")
    return (sum(kept.values()), sum(kept.values()), "rows") if kept else (None, None, "")


def _steps(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
    """Optimizer steps; a warm-up that was killed begins anew, so it has none."""
    if now:
        return now["done"], now["total"], now["unit"]
    checkpoints = entry.get("detail", {}).get("checkpoints")
    return (checkpoints[-1]["step"], checkpoints[-1]["step"], "steps") if checkpoints else (0, None, "steps")


def _gradient_rows(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
    """Rows of finished shards; of the work at hand also those of the shard at work."""
    counts = gradient_rows(run)
    for what, (done, total) in counts.items():
        if now and now["what"] == what and now["total"] == total:
            counts[what] = max(done, now["done"]), total
    return sum(done for done, _ in counts.values()), sum(total for _, total in counts.values()), "rows"


def _strategy_files(name: str) -> Callable[[Run, dict[str, Any], dict[str, Any] | None], Count]:
    def count(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
        names = run.config.selection.strategies
        found = [strategy for strategy in names if (run.folder / "selection" / strategy / name).is_file()]
        return len(found), len(names), "strategies"

    return count


def _cells(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
    """Models scored on a target, of those that the comparison was begun for; one may stand for several cells."""
    plan, found = _plan(run), _cells_found(run)
    return (sum(key in found for key in plan), len(plan), "cells") if plan else (0, None, "cells")


def _nothing(run: Run, entry: dict[str, Any], now: dict[str, Any] | None) -> Count:
    return None, None, ""


COUNTS = {
    "data": _rows_of_data,
    "trajectory": _steps,
    "gradients": _gradient_rows,
    "selection": _strategy_files("path.json"),  # written last
    "export": _strategy_files("selected.jsonl"),
    "evaluation": _cells,
    "report": _nothing,
}


def _plan(run: Run) -> list[tuple[str, str]]:
    try:
        content = json.loads((run.folder / "evaluation" / "plan.json").read_text("utf-8"))
        return [(str(training), str(scored)) for training, scored in content]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def _cells_found(run: Run) -> dict[tuple[str, str], float]:
    """Seconds of every line of the results, by training and rows scored."""
    from gradpursuit.evaluation.journal import Journal

    found = Journal(run.folder / "evaluation" / "results.jsonl", quiet=True).results
    return {key: result.train_seconds + result.score_seconds for key, result in found.items()}


def _cell_rate(run: Run) -> float | None:
    """Cells a second, over those that this comparison wants and has, the base model apart: it takes no training."""
    found = _cells_found(run)
    seconds = [found[key] for key in _plan(run)[1:] if key in found]
    return len(seconds) / sum(seconds) if sum(seconds) else None


def _line(stage: StageStatus) -> tuple[str, ...]:
    done = "" if stage.done is None else f"{stage.done}/{'?' if stage.total is None else stage.total} {stage.unit}"
    return (
        stage.stage,
        stage.state,
        done,
        f"{stage.rate:.3g} {stage.unit}/s" if stage.rate else "",
        clock(stage.left) if stage.left is not None else "",
        f"{stage.seconds:.1f}" if stage.seconds is not None else "",
        (stage.started or "").removesuffix("+00:00").replace("T", " "),
    )


def _now(now: dict[str, Any]) -> str:
    age = time.time() - now["updated"]
    told = f", told {clock(age)} ago" if age > 10 else ""
    return f"{now['what']}: {now['done']}/{now['total'] or '?'} {now['unit']}, {now['rate']:.3g} {now['unit']}/s{told}"


def target_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what :meth:`gradpursuit.targets.Target.describe` says of each target."""
    rows = [("target", "state", "rows", "held out", "pool rows left out", "files")]
    for target in found:
        rows.append(
            (
                target["name"],
                target["state"],
                str(target["rows"].get("target", "")),
                str(target["rows"].get("heldout", "")),
                str(target["left_out"]),
                ", ".join(path for paths in target["files"].values() for path in paths),
            )
        )
    lacking = [target for target in found if target.get("lacking")]
    return columns(rows) + [
        f"{target['name']}: lacks features that the strategies need ({', '.join(target['lacking'])}); "
        f"run `{target['command']}`"
        for target in lacking
    ]


def strategy_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what :func:`gradpursuit.selection.describe_strategies` says, and what is wrong with those it lacks."""
    rows = [("strategy", "random", "needs", "of the target", "source")]
    for entry in (entry for entry in found if "error" not in entry):
        random, origin = "yes" if entry["stochastic"] else "", entry["distribution"]
        source = entry["source"] + (f" [{origin}]" if origin else "")
        rows.append((entry["name"], random, entry["needs"], entry["target"], source))
    return columns(rows) + [entry["error"] for entry in found if "error" in entry]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text whose cells stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
