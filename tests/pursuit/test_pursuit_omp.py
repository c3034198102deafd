"""Non-negative OMP: exact refits, atoms that leave, and when it ends."""

import numpy as np
import pytest
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls as scipy_nnls
from sklearn.base import clone

from gradpursuit.pursuit import NonNegativeOMP
from gradpursuit.pursuit.omp import GrowingCholesky


def reference(A, b, k):
    """The definition, with SciPy's NNLS for each refit."""
    support, r = [], b
    while len(support) < k:
        c = A.T @ r
        c[support] = -np.inf
        if c.max() <= 1e-9:
            break
        support.append(int(c.argmax()))
        x, _ = scipy_nnls(A[:, support], b)
        support = [i for i, value in zip(support, x, strict=True) if value > 0]
        r = b - A[:, support] @ x[x > 0]
    return support, r


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_follows_the_definition(shift):
    left = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        A, b = rng.standard_normal((30, 80)) + shift, rng.standard_normal(30) + shift
        found = NonNegativeOMP(15).fit(A, b)
        support, r = reference(A, b, 15)
        np.testing.assert_array_equal(found.support_, support)
        assert found.residual_path_[-1] == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b), abs=1e-9)
        assert (np.diff(found.objective_path_) < 0).all()
        assert found.kkt_ <= 1e-8
        assert (found.layers_ == 1).all()
        assert (found.coef_[found.support_] > 0).all()
        left += found.n_iter_ > len(found.support_)
    assert left > 0 or shift == 0.0  # the case that weights become zero on the way does occur


def test_exact_recovery_and_its_end():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((200, 300))
    w = np.zeros(300)
    w[rng.choice(300, 8, replace=False)] = rng.uniform(0.5, 2.0, 8)
    found = NonNegativeOMP(20).fit(A, A @ w)
    np.testing.assert_allclose(found.coef_, w, atol=1e-10)
    assert found.stop_reason_ == ["target matched"]
    assert found.n_iter_ == 8


def test_ridge_is_the_ridge_of_the_definition():
    rng = np.random.default_rng(0)
    A, b = np.abs(rng.standard_normal((30, 40))), np.abs(rng.standard_normal(30))
    found = NonNegativeOMP(10, alpha=0.5).fit(A, b)
    S = found.support_
    ridge = 0.5 * np.mean(np.sum(A**2, axis=0))
    wide = np.vstack([A[:, S], np.sqrt(ridge) * np.eye(len(S))])
    expected, _ = scipy_nnls(wide, np.append(b, np.zeros(len(S))))
    np.testing.assert_allclose(found.coef_[S], expected, atol=1e-10)


def test_never_picks_what_adds_nothing():
    A = np.array([[1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    found = NonNegativeOMP(4).fit(A, np.array([1.0, 0.5, 0.0]))
    np.testing.assert_array_equal(found.support_, [0])
    assert found.stop_reason_ == ["no positive correlation"]
    assert found.coef_[0] == pytest.approx(1.0)
    assert NonNegativeOMP(2).fit(-np.eye(2), np.ones(2)).support_.shape == (0,)


def test_a_dependent_atom_is_fitted_safely():
    # The third atom lies in the plane of the first two up to rounding, where a Cholesky factor ends.
    a, c = np.array([2.0, 0.0, 0.1]), np.array([0.0, 1.0, 0.1])
    A = np.stack([a, c, 0.7 * a + 0.3 * c + 1e-9, np.array([0.0, 0.0, 0.3])], axis=1)
    found = NonNegativeOMP(4).fit(A, np.array([2.0, 1.0, 0.7]))
    _, norm = scipy_nnls(A, np.array([2.0, 1.0, 0.7]))
    assert found.residual_path_[-1] * np.linalg.norm([2.0, 1.0, 0.7]) <= norm + 1e-6


def test_growing_factor_is_the_factor():
    rng = np.random.default_rng(0)
    M = rng.standard_normal((60, 40))
    G, q = M.T @ M, rng.standard_normal(40)
    factor = GrowingCholesky.of(G, 0.5)
    np.testing.assert_allclose(factor.solve(q), cho_solve(cho_factor(G + 0.5 * np.eye(40)), q))
    assert GrowingCholesky.of(G[:, [0, 1, 0]][[0, 1, 0]], 0.0).size == 2


def test_estimator_conventions():
    made = NonNegativeOMP(3, alpha=0.2, tol=1e-4)
    assert clone(made).get_params() == {"n_nonzero_coefs": 3, "alpha": 0.2, "tol": 1e-4}
    assert made.fit(np.eye(4), np.arange(4.0)) is made
    np.testing.assert_array_equal(made.support_, [3, 2, 1])
    assert made.stop_reason_ == ["budget filled"]
