"""Tensors where they lie, and the two plain pursuits against their definitions."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls as scipy_nnls
from test_pursuit_gtp import low_rank

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import (
    DenseMatrix,
    GradientMatrix,
    GradientTrajectoryPursuit,
    GradMatch,
    MatchingPursuit,
    TensorMatrix,
    as_matrix,
)
from gradpursuit.pursuit import tensor as tensor_module

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def assert_same(made, X, tol):
    dense, rng = DenseMatrix(X.double()), np.random.default_rng(0)
    D, N = dense.shape
    assert isinstance(made, GradientMatrix)
    assert made.shape == (D, N)
    assert made.nbytes == X.numel() * X.element_size()
    R = rng.standard_normal((D, 3))
    lengths = np.sqrt(dense.squared_norms())[:, None] * np.linalg.norm(R, axis=0)
    assert (np.abs(made.correlate(R) - dense.correlate(R)) <= tol * lengths).all()
    assert (np.abs(made.correlate(R[:, 0]) - dense.correlate(R[:, 0])) <= tol * lengths[:, 0]).all()
    np.testing.assert_allclose(made.squared_norms(), dense.squared_norms(), rtol=1e-12)
    for ids in (rng.permutation(N)[:7], np.array([N - 1]), np.array([], dtype=np.int64)):
        x = rng.standard_normal(len(ids))
        np.testing.assert_array_equal(made.columns(ids), dense.columns(ids))
        np.testing.assert_allclose(made.combine(ids, x), dense.combine(ids, x), atol=1e-11)
    assert made.correlate(R).dtype == made.squared_norms().dtype == np.float64
    assert made.columns(np.array([0])).dtype == (np.float64 if X.dtype == torch.float64 else np.float32)
    for wrong in (-1, N):
        with pytest.raises(PursuitError, match="column ids"):
            made.columns(np.array([wrong]))


@pytest.mark.parametrize("piece_bytes", [256 * 2**20, 300])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_tensor_matrix_is_the_dense_one(dtype, transposed, piece_bytes, monkeypatch):
    monkeypatch.setattr(tensor_module, "_PIECE_BYTES", piece_bytes)
    X = torch.randn(23, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    X = X.T if transposed else X
    assert_same(TensorMatrix(X), X, 1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_pursuit_of_a_tensor_is_that_of_the_array(dtype):
    A, b = low_rank(0)
    X = torch.from_numpy(A).to(dtype)
    found = GradientTrajectoryPursuit(20).fit(TensorMatrix(X), b)
    expected = GradientTrajectoryPursuit(20).fit(DenseMatrix(X.double()), b)
    np.testing.assert_array_equal(found.support_, expected.support_)
    np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-6)
    y = torch.from_numpy(np.stack([b, A[:, 0]], axis=1))
    balanced = GradientTrajectoryPursuit(10, targets="balanced").fit(TensorMatrix(X), y)
    assert len(balanced.support_) == 10
    grown = GradientTrajectoryPursuit(20).fit(TensorMatrix(X[:, :300]), b).extend(TensorMatrix(X[:, 300:]))
    assert grown.residual_path_[-1] <= 1.1 * expected.residual_path_[-1]


def test_a_tensor_is_not_copied_and_gradients_do_not_follow():
    X = torch.randn(5, 9, requires_grad=True)
    made = TensorMatrix(X)
    with torch.no_grad():
        X[:, 3] = 4.0
    np.testing.assert_array_equal(made.columns(np.array([3])), np.full((5, 1), 4.0, dtype=np.float32))


def test_tensors_elsewhere_are_left_there():
    class Elsewhere(torch.Tensor):  # says that it lies on another device
        device = torch.device("cuda")

    assert isinstance(as_matrix(torch.ones(2, 3)), DenseMatrix)
    made = torch.ones(2, 3).as_subclass(Elsewhere)
    seen = []

    class Recording(TensorMatrix):
        def __init__(self, X):
            seen.append(X)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_module, "TensorMatrix", Recording)
        assert isinstance(as_matrix(made), Recording)
    assert seen[0] is made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TYPES)
def test_on_a_gpu(dtype):
    A, b = low_rank(0)
    X = torch.from_numpy(A).to(dtype)
    made = as_matrix(X.cuda())
    assert isinstance(made, TensorMatrix)
    assert_same(made, X, 1e-14 if dtype == torch.float64 else 1e-6)
    found = GradientTrajectoryPursuit(20).fit(X.cuda(), torch.from_numpy(b).cuda())
    expected = GradientTrajectoryPursuit(20).fit(DenseMatrix(X.double()), b)
    np.testing.assert_array_equal(found.support_, expected.support_)
    np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-6)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(3, 0), r"shape \(3, 0\)"),
        (torch.ones(3, 2, dtype=torch.int32), "torch.int32"),
        (torch.tensor([[1.0, torch.nan]]), "first is atom 1"),
        (torch.tensor([[torch.inf, 1.0]], dtype=torch.float16), "first is atom 0"),
    ],
)
def test_refused_tensors(X, message):
    with pytest.raises(PursuitError, match=message):
        TensorMatrix(X)


def plain_matching_pursuit(A, b, k, ridge, tol=1e-6):
    """The definition: the largest fall of the objective by one weight, exact steps, at most k atoms."""
    w, squares = np.zeros(A.shape[1]), (A**2).sum(axis=0) + ridge
    best = 0.5 * b @ b
    while True:
        g = np.maximum(A.T @ (b - A @ w) - ridge * w, 0.0)
        if (w > 0).sum() == k:
            g[w == 0] = 0.0
        i = np.argmax(g**2 / squares)
        new = w + np.eye(len(w))[i] * g[i] / squares[i]
        value = 0.5 * np.sum((A @ new - b) ** 2) + 0.5 * ridge * new @ new
        if best - value <= tol * min(best, 0.5 * b @ b - value):
            return w
        w, best = new, value


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_matching_pursuit_is_its_definition(alpha):
    for seed in range(4):
        A, b = low_rank(seed, N=150)
        A = A * np.random.default_rng(seed).uniform(0.5, 2.0, 150)
        found = MatchingPursuit(12, alpha=alpha, max_iter=10_000).fit(A, b)
        np.testing.assert_allclose(found.coef_, plain_matching_pursuit(A, b, 12, alpha * (A**2).sum() / 150), atol=1e-9)
        assert found.stop_reason_ == ["converged"]
        assert (np.diff(found.objective_path_) < 0).all()
        assert len(found.support_) == 12
        S, ridge = found.support_, alpha * np.mean((A**2).sum(axis=0))
        gradient = (A[:, S].T @ (A @ found.coef_ - b) + ridge * found.coef_[S]) / np.sqrt((A[:, S] ** 2).sum(0) + ridge)
        scale = np.abs(A[:, S].T @ b / np.sqrt((A[:, S] ** 2).sum(0) + ridge)).max()
        assert found.kkt_ == pytest.approx(np.abs(gradient).max() / scale, rel=1e-6)


def test_matching_pursuit_by_hand_and_its_ends():
    A = np.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])
    one = MatchingPursuit(1).fit(A, np.array([0.0, 2.0]))
    np.testing.assert_allclose(one.coef_, [0.0, 2.0, 0.0])
    assert one.stop_reason_ == ["target matched"]
    two = MatchingPursuit(2, max_iter=2).fit(A, np.array([1.0, 1.0]))
    np.testing.assert_array_equal(two.support_, [2, 0])  # in the order in which they were chosen
    np.testing.assert_allclose(two.coef_, [1 - 0.6 * 1.4, 0.0, 1.4])
    assert two.stop_reason_ == ["iteration limit"]
    assert MatchingPursuit(2).fit(-A, np.ones(2)).stop_reason_ == ["no positive correlation"]


def ridge_omp(A, b, k, ridge, tol):
    """GradMatch's selection: the most correlated atom, all weights anew, until the residual is small enough."""
    support, r, x = [], b, np.empty(0)
    while len(support) < k and np.linalg.norm(r) > tol * np.linalg.norm(b):
        c = A.T @ r
        c[support] = 0.0
        support.append(int(c.argmax()))
        wide = np.vstack([A[:, support], np.sqrt(ridge) * np.eye(len(support))])
        x, _ = scipy_nnls(wide, np.append(b, np.zeros(len(support))))
        support, x = [i for i, value in zip(support, x, strict=True) if value > 0], x[x > 0]
        r = b - A[:, support] @ x
    return support, x, r


@pytest.mark.parametrize("tol", [1e-4, 0.7])
@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_gradmatch_is_its_definition(alpha, tol):
    stopped = set()
    for seed in range(4):
        A, b = low_rank(seed, N=150)
        found = GradMatch(25, alpha=alpha, tol=tol).fit(A, b)
        support, x, r = ridge_omp(A, b, 25, alpha, tol)
        np.testing.assert_array_equal(found.support_, support)
        np.testing.assert_allclose(found.coef_[support], x, atol=1e-9)
        assert found.residual_path_[-1] == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b))
        assert (found.residual_path_[:-1] > tol).all()
        stopped |= set(found.stop_reason_)
    assert stopped == {"target matched" if tol == 0.7 else "budget filled"}
