"""Preconditioners against a real Adam step and against formulae written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradpursuit.errors import ConfigError
from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.trajectory.checkpoint import AdamState

SHAPE = (5, 7)
BETAS, EPS = (0.9, 0.999), 1e-8


def adam_after(steps: int, seed: int = 0) -> tuple[torch.nn.Parameter, torch.optim.Adam, AdamState]:
    """A parameter after real optimizer steps with random gradients, and its state as a checkpoint holds it."""
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = torch.optim.Adam([parameter], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.0)
    for _ in range(steps):
        parameter.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()
    held = optimizer.state[parameter]
    state = AdamState({"p": held["exp_avg"].clone()}, {"p": held["exp_avg_sq"].clone()}, int(held["step"]), *BETAS, EPS)
    return parameter, optimizer, state


def apply(kind: Preconditioner, gradient: Tensor, state: AdamState) -> Tensor:
    """Γ of gradients [B, *shape], in that shape."""
    return kind.at(state)("p", coordinates(gradient)).reshape(gradient.shape)


def gradients(count: int = 3, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_adam_is_the_next_optimizer_step(steps: int, scale: float) -> None:
    _, _, state = adam_after(steps)
    features = apply(Preconditioner("adam"), gradients(scale=scale), state)
    for gradient, feature in zip(gradients(scale=scale), features, strict=True):
        parameter, optimizer, _ = adam_after(steps)
        rate = 1.0  # large beside the parameter, so that the difference below keeps its digits
        optimizer.param_groups[0]["lr"] = rate
        before = parameter.detach().double().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        update = (parameter.detach().double() - before) / -rate
        assert torch.allclose(feature.double(), update, rtol=2e-4, atol=2e-6)


def test_adam_without_bias_correction_is_the_formula_of_less() -> None:
    _, _, state = adam_after(4)
    g = gradients().double()
    m, v = state.m["p"].double(), state.v["p"].double()
    expected = (0.9 * m + 0.1 * g) / ((0.999 * v + 0.001 * g * g).sqrt() + 1e-8)
    found = apply(Preconditioner("adam", bias_correction=False), gradients(), state)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)
    corrected = apply(Preconditioner("adam"), gradients(), state)
    assert not torch.allclose(found, corrected, rtol=0.1)


@pytest.mark.parametrize(("name", "power"), [("adam-centered", 1.0), ("adam-symmetric", 0.5), ("identity", 0.0)])
def test_linear_preconditioners_are_their_formulae(name: str, power: float) -> None:
    _, _, state = adam_after(4)
    v_hat = state.v["p"].double().numpy() / (1 - 0.999**4)
    expected = gradients().double().numpy() / (np.sqrt(v_hat) + 1e-8) ** power
    found = apply(Preconditioner(name), gradients(), state)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5)


def test_symmetric_on_both_sides_is_the_centred_influence() -> None:
    """⟨symmetric(a), symmetric(b)⟩ = ⟨centered(a), b⟩: Adam's norm, with pool and target in one space."""
    _, _, state = adam_after(4)
    a, b = gradients(2)
    symmetric = apply(Preconditioner("adam-symmetric"), torch.stack([a, b]), state)
    centered = apply(Preconditioner("adam-centered"), a[None], state)
    assert float((symmetric[0] * symmetric[1]).sum()) == pytest.approx(float((centered[0] * b).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["adam", "adam-centered", "adam-symmetric", "identity"])
def test_rows_do_not_see_each_other(name: str) -> None:
    _, _, state = adam_after(3)
    kind = Preconditioner(name)  # type: ignore[arg-type]
    together = apply(kind, gradients(), state)
    alone = torch.cat([apply(kind, gradient[None], state) for gradient in gradients()])
    assert torch.equal(together, alone)


def test_the_state_is_left_as_it_was() -> None:
    _, _, state = adam_after(3)
    m, v, g = state.m["p"].clone(), state.v["p"].clone(), gradients()
    for name in ("adam", "adam-centered", "adam-symmetric", "identity"):
        apply(Preconditioner(name), g, state)  # type: ignore[arg-type]
    assert torch.equal(state.m["p"], m)
    assert torch.equal(state.v["p"], v)
    assert torch.equal(g, gradients())


def test_what_the_target_gets() -> None:
    assert Preconditioner("adam-symmetric").for_target == Preconditioner("adam-symmetric")
    for name in ("adam", "adam-centered", "identity"):
        assert Preconditioner(name).for_target == Preconditioner("identity")  # type: ignore[arg-type]
    assert Preconditioner("adam", bias_correction=False).for_target == Preconditioner("identity")


def test_labels_tell_apart_what_differs() -> None:
    assert Preconditioner("adam").label == "adam"
    assert Preconditioner("adam", bias_correction=False).label == "adam-uncorrected"


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'adam-symetric'; did you mean 'adam-symmetric'\?"):
        Preconditioner("adam-symetric")  # type: ignore[arg-type]
