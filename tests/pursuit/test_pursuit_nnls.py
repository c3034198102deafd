"""Non-negative least squares against SciPy's."""

import logging

import numpy as np
import pytest
from scipy.optimize import nnls as scipy_nnls

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import DenseMatrix, kkt_violation, nnls
from gradpursuit.pursuit.held import HeldColumns
from gradpursuit.pursuit.newton import Tolerance
from gradpursuit.pursuit.nnls import _Pivoting
from gradpursuit.pursuit.refit import GramRefit, NewtonRefit


def columns(kind, rng):
    D, n = int(rng.integers(5, 90)), int(rng.integers(6, 150))
    A = rng.standard_normal((D, n))
    if kind == "positive":
        return np.abs(A)
    if kind == "copies":
        return np.repeat(A[:, : n // 3], 3, axis=1)
    if kind == "near copies":
        return np.repeat(A[:, : n // 3], 3, axis=1) + 1e-6 * rng.standard_normal((D, 3 * (n // 3)))
    if kind == "low rank":
        return A[:, :3] @ rng.standard_normal((3, n))
    if kind == "ill-conditioned":
        U, s, V = np.linalg.svd(A, full_matrices=False)
        return U * np.logspace(0, -5, len(s)) @ V
    if kind == "monomials":
        return np.vander(np.linspace(0, 1, D), n)
    if kind == "scales":
        return A * np.logspace(-3, 3, n)
    return A


KINDS = ["gaussian", "positive", "copies", "near copies", "low rank", "ill-conditioned", "monomials", "scales"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_objective_as_scipy(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for trial in range(12):
        A = columns(kind, rng)
        b = rng.standard_normal(len(A))
        if trial % 2:  # a target inside the cone
            b = A @ np.maximum(rng.standard_normal(A.shape[1]), 0)
        ridge = [0.0, 0.1][trial % 4 == 3]
        result = nnls(A.T @ A, A.T @ b, ridge=ridge)
        wide = np.vstack([A, np.sqrt(ridge) * np.eye(A.shape[1])])
        expected, _ = scipy_nnls(wide, np.append(b, np.zeros(A.shape[1])), maxiter=100_000)
        assert (result.x >= 0).all()
        assert result.kkt <= 1e-8

        def objective(x, A=A, b=b, ridge=ridge):
            return (np.sum((A @ x - b) ** 2) + ridge * np.sum(x**2)) / (b @ b)

        assert objective(result.x) <= objective(expected) + 1e-6 * (kind == "ill-conditioned") + 1e-10


def test_kkt_is_the_violation_defined():
    G, q = np.array([[4.0, 0.0], [0.0, 1.0]]), np.array([2.0, 3.0])
    # gradient at x = (1, 0): (4 - 2, -3); by lengths (2, 1): (1, -3); the largest atb by length is 3
    assert kkt_violation(G, q, np.array([1.0, 0.0])) == pytest.approx(1.0)
    assert kkt_violation(G, q, np.array([1.0, 3.0])) == pytest.approx(1 / 3)
    assert kkt_violation(G, -q, np.zeros(2)) == 0.0
    result = nnls(G, q)
    assert kkt_violation(G, q, result.x) == pytest.approx(result.kkt, abs=1e-15)


def test_scaling_changes_nothing():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((30, 60)), rng.standard_normal(30)
    x = nnls(A.T @ A, A.T @ b, ridge=0.5).x
    for a, c in ((1e-8, 1e6), (1e9, 1e-7)):
        scaled = nnls(a**2 * (A.T @ A), a * c * (A.T @ b), ridge=0.5 * a**2)
        np.testing.assert_allclose(scaled.x * a / c, x, rtol=1e-7, atol=1e-10)
        assert scaled.kkt <= 1e-8


def test_warm_start_saves_work_and_does_not_change_the_answer():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((200, 150)), rng.standard_normal(200)
    cold = nnls(A.T @ A, A.T @ b)
    warm = nnls(A.T @ A, A.T @ b, start=cold.x)
    wrong = nnls(A.T @ A, A.T @ b, start=(cold.x == 0).astype(float))
    assert warm.n_iter == 1 < cold.n_iter
    np.testing.assert_allclose(warm.x, cold.x, atol=1e-12)
    np.testing.assert_allclose(wrong.x, cold.x, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_safe_method_alone_solves_it(kind, monkeypatch):
    monkeypatch.setattr(_Pivoting, "_exchange_blocks", lambda self, q, passive: (np.zeros(len(q)), False))
    rng = np.random.default_rng(100 + KINDS.index(kind))
    for _ in range(3):
        A = columns(kind, rng)
        b = rng.standard_normal(len(A))
        assert nnls(A.T @ A, A.T @ b, max_iter=20_000).kkt <= 1e-8


def test_no_positive_product_gives_zero():
    result = nnls(np.eye(3), np.array([-1.0, 0.0, -2.0]))
    assert not result.x.any()
    assert result.kkt == 0.0
    assert nnls(np.empty((0, 0)), np.empty(0)).x.shape == (0,)


def test_too_few_iterations_are_told_by_kkt():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((100, 150)), rng.standard_normal(100)
    result = nnls(A.T @ A, A.T @ b, max_iter=1)
    assert result.kkt > 1e-3
    assert result.kkt == pytest.approx(kkt_violation(A.T @ A, A.T @ b, result.x))


def test_a_thousand_columns_with_near_copies():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((300, 500))
    A = np.hstack([A, A + 1e-6 * rng.standard_normal(A.shape)])
    b = rng.standard_normal(300)
    assert nnls(A.T @ A, A.T @ b).kkt <= 1e-8


@pytest.mark.parametrize("D", [300, 1000])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_newton_steps_on_coherent_columns(D, ridge, caplog):
    """600 columns near five directions: by steps where they suffice, by pivoting, which is told, where not."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((D, 5)) @ (rng.standard_normal((5, 600)) + 0.3) + 0.1 * rng.standard_normal((D, 600))
    A = (A / np.linalg.norm(A, axis=0)).astype(np.float32)
    b = A[:, :40].mean(axis=1, dtype=np.float64) + 0.1 * rng.standard_normal(D) / np.sqrt(D)
    matrix, ids = DenseMatrix(A), np.arange(600)
    held = HeldColumns(matrix, b[:, None], np.ones(600), 600)
    held.load(ids)
    exact = GramRefit(held, b[:, None])
    made = NewtonRefit(held, b[:, None], np.sqrt(matrix.squared_norms()), exact)
    with caplog.at_level(logging.INFO, logger="gradpursuit"):
        x, r, kkt = made.solve(ids, np.zeros((600, 1)), ridge, Tolerance(1e-7))
    assert kkt <= 1e-5
    assert ("solved by pivoting" in caplog.text) == (D == 300 and ridge == 0.0)
    expected, residual, _ = exact.solve(ids, x, ridge, Tolerance(1e-7))
    np.testing.assert_allclose(r, residual, atol=1e-5)
    np.testing.assert_allclose(x, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("gram", "atb", "options", "message"),
    [
        (np.eye(2), np.ones(3), {}, "do not fit"),
        (np.eye(2), np.ones(2), {"start": np.ones(3)}, "do not fit"),
        (np.full((2, 2), np.nan), np.ones(2), {}, "finite"),
        (np.eye(2), np.ones(2), {"ridge": -1.0}, "ridge is -1"),
        (np.zeros((2, 2)), np.ones(2), {}, "no solution"),
    ],
)
def test_refusals(gram, atb, options, message):
    with pytest.raises(PursuitError, match=message):
        nnls(gram, atb, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gram": [[1, 0.5], [0, 1]]}, "gram\\[0, 1\\] is 0.5 but gram\\[1, 0\\] is 0"),
        ({"gram": np.eye(2) * 1j}, "gram holds complex128 values"),
        ({"atb": ["a", "b"]}, "atb holds <U1 values"),
        ({"ridge": "a"}, "ridge is 'a'"),
        ({"tol": -1}, "tol is -1"),
        ({"max_iter": 0}, "max_iter is 0"),
    ],
)
def test_what_is_no_such_problem_is_refused(arguments, message):
    with pytest.raises(PursuitError, match=message):
        nnls(**{"gram": np.eye(2), "atb": np.ones(2), **arguments})
