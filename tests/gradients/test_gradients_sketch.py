"""The sketch: unbiased, within its error, the same everywhere, and equal to the matrix that it never forms."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.sketch import SparseSketch


def apply(sketch: SparseSketch, values: dict[str, Tensor]) -> Tensor:
    """The sketch [B, d] of one value per parameter."""
    out = torch.zeros(len(next(iter(values.values()))), sketch.dim)
    for name, value in values.items():
        sketch.add(name, value, out)
    return out


def dense(sketch: SparseSketch, name: str, size: int) -> Tensor:
    """The matrix [d, size], column by column."""
    return apply(sketch, {name: torch.eye(size)}).t()


@pytest.mark.parametrize("nonzeros", [1, 2, 4])
def test_inner_products_are_unbiased(nonzeros: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, generator=generator)
    y = 0.5 * x + y
    products = []
    for seed in range(400):
        sx, sy = apply(SparseSketch({"p": 300}, 64, nonzeros, seed), {"p": torch.stack([x, y])})
        products.append(float(sx @ sy))
    error = np.std(products, ddof=1) / np.sqrt(len(products))
    assert abs(np.mean(products) - float(x @ y)) < 4 * error
    assert error < 0.1 * abs(float(x @ y))


@pytest.mark.parametrize("dim", [256, 1024])
def test_norms_and_products_stay_within_the_bound(dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 20_000, generator=generator)
    s = apply(SparseSketch({"p": 20_000}, dim, 2, 7), {"p": x})
    relative = (s.norm(dim=1) / x.norm(dim=1) - 1).abs()
    assert float(relative.max()) < 5 / dim**0.5
    cosine = s @ s.t() / torch.outer(s.norm(dim=1), s.norm(dim=1)) - x @ x.t() / torch.outer(
        x.norm(dim=1), x.norm(dim=1)
    )
    assert float(cosine.abs().max()) < 5 / dim**0.5


def test_sparse_and_spiky_vectors_too() -> None:
    """A gradient's mass may lie in few coordinates; signs, not Gaussian values, must carry the bound."""
    x = torch.zeros(30, 5_000)
    generator = torch.Generator().manual_seed(2)
    for row in x:
        row[torch.randperm(5_000, generator=generator)[:50]] = 10 * torch.randn(50, generator=generator)
    s = apply(SparseSketch({"p": 5_000}, 1024, 2, 3), {"p": x})
    assert float((s.norm(dim=1) / x.norm(dim=1) - 1).abs().max()) < 5 / 32


@pytest.mark.parametrize("nonzeros", [1, 2, 3])
def test_columns_hold_signs_of_the_right_size(nonzeros: int) -> None:
    matrix = dense(SparseSketch({"p": 500}, 128, nonzeros, 0), "p", 500).double()
    units = matrix * nonzeros**0.5
    assert torch.allclose(units, units.round(), atol=1e-5)  # whole numbers: sums of signs
    assert int(units.abs().sum(0).max().round()) == nonzeros
    assert float((units.abs().sum(0).round() == nonzeros).double().mean()) > 0.95  # few of them meet and cancel
    assert abs(float(units.sum())) < 4 * (500 * nonzeros) ** 0.5


def test_add_equals_the_dense_product_and_accumulates() -> None:
    sketch = SparseSketch({"a": 12, "b": 30}, 16, 2, 5)
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(3, 4, 3, generator=generator), torch.randn(3, 5, 6, generator=generator)
    found = apply(sketch, {"a": a, "b": b})
    expected = coordinates(a) @ dense(sketch, "a", 12).t() + coordinates(b) @ dense(sketch, "b", 30).t()
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_matrix_is_numbered_along_its_longer_side() -> None:
    sketch = SparseSketch({"p": 35}, 16, 2, 5)
    tall = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    wide = tall.transpose(1, 2)
    assert torch.equal(apply(sketch, {"p": tall}), apply(sketch, {"p": wide}))
    assert torch.equal(apply(sketch, {"p": wide.contiguous()}), apply(sketch, {"p": wide.flatten(1)}))


def test_coordinates_of_one_piece_never_meet() -> None:
    units = (dense(SparseSketch({"p": 3 * 64}, 64, 1, 0), "p", 3 * 64) != 0).reshape(64, 3, 64)
    assert (units.sum(2) == 1).all()


def test_rows_depend_on_seed_and_name_alone() -> None:
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    alone = apply(SparseSketch({"p": 50}, 32, 2, 1), {"p": x})
    among = apply(SparseSketch({"o": 9, "p": 50, "q": 70}, 32, 2, 1), {"p": x})
    assert torch.equal(alone, among)
    assert not torch.allclose(alone, apply(SparseSketch({"p": 50}, 32, 2, 2), {"p": x}))
    assert not torch.allclose(alone, apply(SparseSketch({"q": 50}, 32, 2, 1), {"q": x}))


def test_a_row_does_not_see_its_batch() -> None:
    sketch = SparseSketch({"p": 4_000}, 256, 2, 1)
    x = torch.randn(33, 4_000, generator=torch.Generator().manual_seed(0))
    together = apply(sketch, {"p": x})
    for index in (0, 17, 32):
        alone = apply(sketch, {"p": x[index : index + 1]})[0]
        assert torch.allclose(together[index], alone, rtol=1e-5, atol=1e-5)
    flipped = apply(sketch, {"p": x.flip(0)}).flip(0)
    assert torch.allclose(together, flipped, rtol=1e-5, atol=1e-5)


def test_the_matrix_is_pinned() -> None:
    """Features on disk outlive library versions: the same seed must mean the same matrix for ever."""
    units = (
        (
            dense(
                SparseSketch({"model.layers.0.q_proj.lora_A.weight": 200}, 64, 2, 42),
                "model.layers.0.q_proj.lora_A.weight",
                200,
            )
            * 2**0.5
        )
        .round()
        .to(torch.int8)
    )
    digest = hashlib.sha256(units.numpy().tobytes()).hexdigest()
    assert digest == "1108fd93f7427df037157bf68fc26579421cf03861e158e9525e8ed07b961a89"


def test_describe_says_what_tells_sketches_apart() -> None:
    assert SparseSketch({"a": 12, "b": 30}, 16, 2, 5).describe() == {
        "name": "rotation-count-sketch",
        "seed": 5,
        "dim": 16,
        "nonzeros": 2,
        "source_size": 42,
    }
