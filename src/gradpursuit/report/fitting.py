"""What a report says that needs the gradients: fit, copies, whom a row serves, the wrong-target control."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from gradpursuit.data import Row, Table
from gradpursuit.report.absent import AbsentError
from gradpursuit.report.fit import COLUMN_BYTES, PASS_BYTES, Explainer, Ints, Match, alignment, cosines, near_copies
from gradpursuit.report.sections import Selections, chosen_rows, described
from gradpursuit.report.texts import line
from gradpursuit.selection import Selection
from gradpursuit.selection.export import copies_chosen

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run

SHOWN_TARGETS = 200
_SERVED = 3
_LINE = 110  # characters of a row that is named beside another


class Fitting:
    """The parts about one strategy's selection and its target; `selections` of the others stand beside.

    Args:
        run: whose selections are made.
        primary: the strategy that the report is about.
        full: make also what takes long with large pools or budgets.

    Raises:
        AbsentError: the features were not collected, or reading them takes long.
    """

    def __init__(self, run: Run, pool: Table, selections: Selections, primary: str, *, full: bool) -> None:
        self._run, self._pool, self._full = run, pool, full
        self._chosen = {name: draws[0] for name, draws in selections.items()}
        self._explainer = Explainer(run)
        if not self._explainer.available:
            raise AbsentError(
                f"the features of a pursuit ('{self._explainer.label}') were not collected, as no configured strategy "
                "uses them; add gtp to selection.strategies and collect",
                shlex.join(["gradpursuit", "collect", str(run.folder)]),
            )
        self._name, self._selection = primary, self._chosen[primary]
        largest = max(len(selection.indices) for selection in self._chosen.values())
        self._refuse_long(self._explainer.column_bytes(largest), COLUMN_BYTES, f"features of {largest:,} chosen rows")
        self._matches = {name: self._match(selection.indices) for name, selection in self._chosen.items()}
        self._match_of_primary = self._matches[primary]
        self._weights = self._selection.weights[np.argsort(self._selection.indices)]

    def fit(self) -> dict[str, Any]:
        """Residual and alignment of the weighted rows, for every strategy, target group and checkpoint."""
        match, groups = self._match_of_primary, self._explainer.groups
        weighted = match.columns @ self._weights
        directions = {
            name: match.examples[:, groups == number].mean(axis=1)
            for number, name in enumerate(self._explainer.group_names)
        }
        residual = match.residual(match.refit())
        return {
            "strategy": self._name,
            "features": self._explainer.label,
            "subspace": self._explainer.subspace,
            "relative_residual": residual,
            "explained": 1 - residual**2,
            "checkpoints": [alignment(weighted[block], match.target[block]) for block in match.blocks],
            "groups": [
                {
                    "group": name,
                    "examples": int((groups == number).sum()),
                    "overall": alignment(weighted, direction),
                    "checkpoints": [alignment(weighted[block], direction[block]) for block in match.blocks],
                }
                for number, (name, direction) in enumerate(directions.items())
            ],
            "strategies": {name: other.residual(other.refit()) for name, other in self._matches.items()},
        }

    def duplicates(self) -> dict[str, Any]:
        """Copies among the chosen rows of every strategy, and among those that top-k on the same features takes."""
        coherence = self._run.config.pursuit.max_coherence or 1.0
        lines = [
            self._copies(name, selection, self._matches[name], coherence) for name, selection in self._chosen.items()
        ]
        found: dict[str, Any] = {"strategy": self._name, "coherence": coherence, "strategies": lines}
        try:
            self._refuse_long(self._explainer.bytes, PASS_BYTES, "all features of the pool, for top-k")
        except AbsentError as absent:
            found["top_k"] = absent.to_json()
        else:
            top = Selection.ranked(self._explainer.top(len(self._selection.indices)))
            found["top_k"] = self._copies("top-k", top, self._match(top.indices), coherence)
        set_aside: dict[str, str] = self._selection.evidence.get("copies", {})
        found["set_aside"] = [{"id": copy, "of": of} for copy, of in set_aside.items()]
        return found

    def rows(self) -> dict[str, Any]:
        """The chosen rows, best first, with text, weight and the target examples whose gradients they point along."""
        served = cosines(self._match_of_primary.columns, self._match_of_primary.examples)
        place = np.argsort(np.argsort(self._selection.indices))
        targets = self._explainer.target_rows
        copies: dict[str, list[str]] = {}
        for copy, of in self._selection.evidence.get("copies", {}).items():
            copies.setdefault(of, []).append(copy)
        found = chosen_rows(self._pool, self._selection, self._name)
        for rank, row in enumerate(found["rows"]):
            along = served[place[rank]]
            best = np.argsort(-along, kind="stable")[:_SERVED].tolist()
            row["serves"] = [_served(targets[j], along[j]) for j in best if along[j] > 0]
            row["copies"] = copies.get(row["id"], [])
        return found

    def targets(self) -> dict[str, Any]:
        """Every target example: how far the weighted rows point along its gradient, the least served first."""
        match, rows = self._match_of_primary, self._explainer.target_rows
        weighted = match.columns @ self._weights
        along = cosines(weighted[:, None], match.examples)[0]
        served = cosines(match.columns, match.examples)
        ids = np.sort(self._selection.indices)
        found = []
        for j in np.argsort(along, kind="stable").tolist()[:SHOWN_TARGETS]:
            best = np.argsort(-served[:, j], kind="stable")[:_SERVED].tolist()
            by = [_served(self._pool[int(ids[i])], served[i, j]) for i in best if served[i, j] > 0]
            told = described(rows[j], self._explainer.source_names)
            found.append({**told, "text": line(rows[j].columns), "cosine": float(along[j]), "by": by})
        return {"strategy": self._name, "count": len(rows), "examples": found}

    def control(self) -> dict[str, Any]:
        """How much of other targets the same rows explain, beside their own.

        Raises:
            AbsentError: the run has no other target.
        """
        own = self._run.config.selection.target
        others = [name for name in [None, *self._run.added_targets()] if name != own]
        if not others:
            raise AbsentError(
                "the run has no other target to compare with",
                f"gradpursuit target add {shlex.quote(str(self._run.folder))} --name OTHER --file other.jsonl",
            )
        indices = np.sort(self._selection.indices)
        found = []
        for name in others:
            match = self._explainer.match(indices, Explainer(self._run.for_target(name)))
            aligned = alignment(match.columns @ self._weights, match.target)
            found.append({"target": name, "relative_residual": match.residual(match.refit()), "alignment": aligned})
        match = self._match_of_primary
        mine = {
            "target": own,
            "relative_residual": match.residual(match.refit()),
            "alignment": alignment(match.columns @ self._weights, match.target),
        }
        return {"strategy": self._name, "own": mine, "others": found}

    def _match(self, indices: Ints) -> Match:
        return self._explainer.match(np.sort(indices))

    def _copies(self, name: str, selection: Selection, match: Match, coherence: float) -> dict[str, Any]:
        return {
            "strategy": name,
            "examples": len(selection.indices),
            "text": copies_chosen(selection, self._pool),
            "gradient": near_copies(match.columns, coherence),
        }

    def _refuse_long(self, size: int, limit: int, what: str) -> None:
        if size > limit and not self._full:
            raise AbsentError(
                f"this reads the {what} ({size / 2**30:.1f} GiB), which takes a while",
                f"gradpursuit report {shlex.quote(str(self._run.folder))} --full",
            )


def _served(row: Row, cosine: float) -> dict[str, Any]:
    return {"id": row.id, "cosine": float(cosine), "text": line(row.columns, _LINE)}
