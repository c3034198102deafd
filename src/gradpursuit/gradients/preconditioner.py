"""From a gradient to the direction in which the optimizer would move: Γ_t of one checkpoint.

Every preconditioner works on the per-example gradients of one parameter, as float32 `[B, n]`
(:func:`~gradpursuit.gradients.layout.coordinates`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradpursuit.config import PreconditionerName
from gradpursuit.errors import ConfigError, nearest
from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.loops import adam
from gradpursuit.trajectory.checkpoint import AdamState

PreconditionerLabel = Literal["adam-symmetric", "adam", "adam-uncorrected", "adam-centered", "identity"]


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

    @classmethod
    def labelled(cls, label: PreconditionerLabel) -> Preconditioner:
        """That of a label."""
        name = label.removesuffix("-uncorrected")
        return cls(name, bias_correction=name == label)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """A name for folders; it tells apart whatever gives different features."""
        return self.name if self.bias_correction else f"{self.name}-uncorrected"

    def describe(self) -> dict[str, Any]:
        """What makes its features what they are, as JSON values."""
        return {"preconditioner": {"name": self.name, "bias_correction": self.bias_correction}}

    @property
    def for_target(self) -> Preconditioner:
        """What the target's gradients get: the same for `adam-symmetric`, otherwise `identity`."""
        return self if self.name == "adam-symmetric" else Preconditioner("identity")

    def at(self, state: AdamState) -> Callable[[str, Tensor], Tensor]:
        """Γ of one checkpoint: a function of a parameter's name and its gradients [B, n], which are left as they are.

        What all rows share is computed here, once.
        """
        if self.name == "identity":
            return lambda _parameter, gradient: gradient
        if self.name == "adam":
            return _AdamStep(state, self.bias_correction)
        return _Scaled(state, 0.5 if self.name == "adam-symmetric" else 1.0)


class _Scaled:
    """g / (√v̂ + ε)^power."""

    def __init__(self, state: AdamState, power: float) -> None:
        self._state, self._power, self._correction = state, power, 1 - state.beta2**state.step
        self._factors: dict[str, Tensor] = {}

    def __call__(self, parameter: str, gradient: Tensor) -> Tensor:
        if parameter not in self._factors:
            root = (_flat(self._state.v[parameter]) / self._correction).sqrt() + self._state.eps
            self._factors[parameter] = root.pow(-self._power)
        return gradient * self._factors[parameter]


class _AdamStep:
    """m' / (√v' + ε), with what does not depend on the gradient kept: β₁m and β₂v, both bias-corrected or not."""

    def __init__(self, state: AdamState, bias_correction: bool) -> None:
        step = state.step + 1
        self._state = state
        self._of_m, self._of_v = (1 - state.beta1**step, 1 - state.beta2**step) if bias_correction else (1.0, 1.0)
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, parameter: str, gradient: Tensor) -> Tensor:
        state = self._state
        if parameter not in self._kept:
            m, v = _flat(state.m[parameter]), _flat(state.v[parameter])
            self._kept[parameter] = m * (state.beta1 / self._of_m), v * (state.beta2 / self._of_v)
        m, v = self._kept[parameter]
        of_g, of_square = (1 - state.beta1) / self._of_m, (1 - state.beta2) / self._of_v
        if gradient.device.type == "cpu":
            gradient, out = gradient.contiguous(), torch.empty(gradient.shape)
            adam(gradient.numpy(), m.numpy(), v.numpy(), of_g, of_square, state.eps, out.numpy())
            return out
        root = torch.addcmul(v, gradient, gradient, value=of_square).sqrt_().add_(state.eps)
        return torch.add(m, gradient, alpha=of_g).div_(root)


def _flat(moment: Tensor) -> Tensor:
    """[n], numbered as the gradients are."""
    return coordinates(moment[None])[0].contiguous()
