"""From a gradient to the direction in which the optimizer would move: Γ_t of one checkpoint.

Every preconditioner works on the per-example gradients of one parameter, `[B, *shape]` float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from gradpursuit.config import PreconditionerName
from gradpursuit.errors import ConfigError, nearest
from gradpursuit.trajectory.checkpoint import AdamState


@dataclass(frozen=True)
class Preconditioner:
    """Which Γ, by name.

    * `identity`: g.
    * `adam`: the update that Adam would make if its next batch were this example,
      m̂' / (√v̂' + ε) with m' = β₁m + (1-β₁)g and v' = β₂v + (1-β₂)g² (LESS, arXiv 2402.04333; LESS leaves the
      bias correction out: `bias_correction=False`).
    * `adam-centered`: g / (√v̂ + ε): without the momentum, which all examples share.
    * `adam-symmetric`: g / √(√v̂ + ε), for pool and target alike, so that ⟨u, g⟩ is the Adam-weighted influence.

    `bias_correction` concerns `adam` alone; for the other two v̂ is always the corrected v / (1-β₂^step).
    """

    name: PreconditionerName
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.name not in get_args(PreconditionerName):
            raise ConfigError(
                f"unknown preconditioner '{self.name}'; {nearest(self.name, get_args(PreconditionerName))}"
            )

    @property
    def label(self) -> str:
        """A name for folders; it tells apart whatever gives different features."""
        return self.name if self.bias_correction else f"{self.name}-uncorrected"

    @property
    def for_target(self) -> Preconditioner:
        """What the target's gradients get: the same for `adam-symmetric`, otherwise `identity`."""
        return self if self.name == "adam-symmetric" else Preconditioner("identity")

    def __call__(self, parameter: str, gradient: Tensor, state: AdamState) -> Tensor:
        """Γ of `gradient [B, *shape]` of one parameter, given the optimizer's state at the checkpoint."""
        if self.name == "identity":
            return gradient
        if self.name == "adam":
            return self._adam(parameter, gradient, state)
        denominator = (state.v[parameter] / (1 - state.beta2**state.step)).sqrt() + state.eps
        if self.name == "adam-symmetric":
            denominator = denominator.sqrt()
        return gradient / denominator

    def _adam(self, parameter: str, gradient: Tensor, state: AdamState) -> Tensor:
        m = torch.add(state.beta1 * state.m[parameter], gradient, alpha=1 - state.beta1)
        v = torch.addcmul(state.beta2 * state.v[parameter], gradient, gradient, value=1 - state.beta2)
        if self.bias_correction:
            m = m / (1 - state.beta1 ** (state.step + 1))
            v = v / (1 - state.beta2 ** (state.step + 1))
        return m / (v.sqrt() + state.eps)
