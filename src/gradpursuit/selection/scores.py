"""What the strategies that score each row on its own have in common: influence on the target, and whom to keep."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from gradpursuit.config import Fraction, MatchingSection, Number, Section
from gradpursuit.gradients.forward import EMBEDDING
from gradpursuit.gradients.preconditioner import Preconditioner, PreconditionerLabel
from gradpursuit.selection.base import FeatureKind, Selection, SelectionProblem, Settings

Array = NDArray[np.float64]
Reducer = Literal["mean", "max"]
TRIM = (
    "the highest scores that are left out first, as they are often wrong answers: a share of the rows, or 2sd: those "
    "above the mean by more than two standard deviations"
)


def reduced(scores: Array, reducer: Reducer) -> Array:
    """Of scores [N, q] for q target groups one for each row: [N]."""
    return np.asarray(scores.mean(axis=1) if reducer == "mean" else scores.max(axis=1))


def settings_of(own: MatchingSection, common: MatchingSection) -> MatchingSection:
    """The `common` settings with those in their place that were given to a strategy of its `own`."""
    given = {name: getattr(own, name) for name in own.model_fields_set if name in type(common).model_fields}
    return common.model_copy(update=given)


class InfluenceSection(Section):
    """Which features tell how a pool row acts on the target, and how they are compared."""

    features: Literal["gradient", "embedding"] = Field(
        "gradient", description="gradients along the trajectory, or embeddings of the base model"
    )
    preconditioner: PreconditionerLabel | None = Field(
        None, description="of the gradients; null: that of section gradients"
    )
    similarity: Literal["cosine", "dot"] = Field(
        "cosine",
        description="of pool row and target row; summed over checkpoints, times the learning rate",
    )

    @model_validator(mode="after")
    def _of_gradients(self) -> InfluenceSection:
        if self.features == "embedding" and "preconditioner" in self.model_fields_set and self.preconditioner:
            raise ValueError("preconditioner is of gradients: leave it out with features: embedding")
        return self

    def kind(self, settings: Settings) -> FeatureKind:
        """The features that are compared."""
        if self.features == "embedding":
            return EMBEDDING
        return Preconditioner.labelled(self.preconditioner or settings.gradients.preconditioner)

    def on_groups(self, problem: SelectionProblem) -> Array:
        """Influence on every target group, the mean over its rows: float64 [N, q]."""
        kind = self.kind(problem.settings)
        target = problem.target[_label(kind)]
        means = target.group_means(problem.groups, unit=self.similarity == "cosine")
        return self._compared(problem, kind, np.moveaxis(means, 1, 2))

    def on_rows(self, problem: SelectionProblem) -> Array:
        """Influence on every target row: float64 [N, M]."""
        kind = self.kind(problem.settings)
        target = problem.target[_label(kind)]
        rows = [target.at(t) for t in range(target.checkpoints)]
        if self.similarity == "cosine":
            rows = [at / np.linalg.norm(at, axis=1, keepdims=True) for at in rows]
        return self._compared(problem, kind, np.array([at.T for at in rows]))

    def _compared(self, problem: SelectionProblem, kind: FeatureKind, directions: Array) -> Array:
        """Σ_t η_t ⟨U_t[i], directions_t⟩ [N, q], for cosines of unit U_t[i] and with η that sum up to 1."""
        pool = problem.pool[kind.label]
        cosine = self.similarity == "cosine"
        rates = problem.rates if self.features == "gradient" else np.ones(1)
        shares = rates / rates.sum() if cosine else rates
        norms = pool.norms() if cosine else np.ones((len(shares), 1))
        parts = [share * pool.dot(t, directions[t]) / norms[t][:, None] for t, share in enumerate(shares)]
        return np.asarray(np.sum(parts, axis=0))


def _label(kind: FeatureKind) -> str:
    of_target = kind.for_target
    assert of_target is not None
    return of_target.label


class KeepSection(Section):
    """Whom to keep of rows that are scored by difficulty."""

    keep: Literal["hardest", "easiest", "band"] = Field("hardest", description="the k highest, the k lowest, or a band")
    band: Fraction = Field(0.5, description="centre of the band, as a quantile of the scores: 0.5 is the median")
    trim: Literal["2sd"] | Number | None = Field(None, description=TRIM)

    @field_validator("trim", mode="after")
    @classmethod
    def _a_share(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float | int) and not 0 <= value < 1:
            raise ValueError("a share of the rows from 0 to below 1, 2sd, or null")
        return value

    def kept(self, scores: Array, k: int) -> Selection:
        """The `k` rows of [N] that are to be kept, the one furthest to the wanted side (or nearest the centre) first.

        Equal scores are in pool order. Fewer than `k` are kept if fewer are left after `trim`.
        """
        order = self.ordered(scores)
        evidence: dict[str, Any] = {"scores": scores[order[:k]].tolist()}
        if trimmed := len(scores) - len(order):
            evidence["trimmed"] = trimmed
        return Selection.ranked(order[:k], evidence)

    def ordered(self, scores: Array) -> NDArray[np.int64]:
        """Positions of all rows that `trim` leaves, int64, in the order in which they are kept."""
        highest = np.argsort(-scores, kind="stable")
        left = np.ones(len(scores), dtype=bool)
        left[highest[: self._trimmed(scores)]] = False
        if self.keep == "hardest":
            return highest[left[highest]]
        order = np.argsort(scores, kind="stable")
        order = order[left[order]]
        if self.keep == "band":
            centre = self.band * (len(order) - 1)
            order = order[np.argsort(np.abs(np.arange(len(order)) - centre), kind="stable")]
        return order

    def _trimmed(self, scores: Array) -> int:
        """How many rows are left out, a share rounded down."""
        if self.trim is None:
            return 0
        if self.trim == "2sd":
            spread = scores.std(ddof=1) if len(scores) > 1 else 0.0
            return int((scores > scores.mean() + 2 * spread).sum())
        return int(float(self.trim) * len(scores) + 1e-9)
