"""`tracin`: the k examples whose plain gradient steps would have lowered the target's loss most."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.selection.less import LESS
from gradpursuit.selection.scores import Reducer


class TracIn(LESS):
    """Σ_t η_t ⟨∇ℓ(z_i; θ_t), g_t⟩, TracInCP (arXiv 2002.08484), g_t the mean of the target groups' means; then top-k.

    In the paper θ_t are checkpoints of the training run itself; here they are those of the warm-up.
    """

    source: ClassVar[str] = "Pruthi, Liu, Sundararajan, Kale, arXiv 2002.08484"

    preconditioner: PreconditionerLabel | None = Field(
        "identity", description="of the gradients; null: that of section gradients"
    )
    similarity: Literal["cosine", "dot"] = Field("dot", description="inner product, or the cosine instead")
    reducer: Reducer = Field("mean", description="of the influences on the target groups")
