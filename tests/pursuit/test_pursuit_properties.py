"""What holds for every problem: invariances on generated problems, and oracles on small ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as scipy_nnls

from gradpursuit.pursuit import (
    GradientTrajectoryPursuit,
    GradMatch,
    MatchingPursuit,
    NonNegativeOMP,
    nnls,
)
from gradpursuit.pursuit import problem as problem_module
from gradpursuit.pursuit.newton import Columns, Tolerance, nnls_columns
from gradpursuit.pursuit.rows import Rows

ESTIMATORS = [GradientTrajectoryPursuit, NonNegativeOMP, GradMatch, MatchingPursuit]
REFITTING = ESTIMATORS[:3]
SOME = settings(max_examples=30, deadline=None, derandomize=True, database=None)
ALPHAS = st.sampled_from([0.0, 1e-3, 0.3, 10.0])


@pytest.fixture(params=["gram", "columns"], scope="module", autouse=True)
def way(request):
    """Both ways of refitting: by Gram matrix, and by Newton steps on the columns."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "columns":
            patch.setattr(problem_module, "GRAM_COLUMNS", 0)
        yield request.param


@st.composite
def problems(draw, most=24):
    """A [D, N] and b [D]: Gaussian, positive, low-rank, badly scaled or grid-valued (with ties, zeros, copies)."""
    D, N = draw(st.integers(1, 16)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    A = rng.standard_normal((D, N))
    kind = draw(st.sampled_from(["gaussian", "positive", "low rank", "scales", "grid"]))
    if kind == "positive":
        A = np.abs(A)
    elif kind == "low rank":
        A = A[:, :2] @ rng.standard_normal((A[:, :2].shape[1], N))
    elif kind == "scales":
        A = A * 10.0 ** rng.uniform(-2, 2, N)
    elif kind == "grid":
        A = np.round(A)
    inside = draw(st.booleans())  # whether the target lies in the cone of the atoms
    b = A @ np.maximum(rng.standard_normal(N), 0.0) if inside else rng.standard_normal(D)
    if not b.any():
        b = np.ones(D)
    return A, b


def budgets(A):
    return st.integers(1, A.shape[1])


def fitted(data, estimator):
    """A, b, k, alpha and the estimator fitted to them."""
    A, b = data.draw(problems())
    k, alpha = data.draw(budgets(A)), data.draw(ALPHAS)
    return A, b, k, alpha, estimator(k, alpha=alpha).fit(A, b)


def ridge_of(A, alpha):
    return alpha * np.mean(np.sum(A**2, axis=0))


def objective(A, b, w, ridge):
    return 0.5 * np.sum((A @ w - b) ** 2) + 0.5 * ridge * np.sum(w**2)


def violation(A, b, S, w, ridge):
    """KKT on the support S, from the definition: |gradient| where w > 0, relative to the largest correlation."""
    if not len(S):
        return 0.0
    lengths = np.sqrt(np.sum(A[:, S] ** 2, axis=0) + ridge)
    gradient = (A[:, S].T @ (A[:, S] @ w - b) + ridge * w) / lengths
    return np.abs(gradient).max() / np.abs(A[:, S].T @ b / lengths).max()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@SOME
@given(data=st.data())
def test_non_negative_within_the_budget_monotone_and_optimal(estimator, data):
    A, b, k, alpha, found = fitted(data, estimator)
    S, w = found.support_, found.coef_
    assert (w >= 0).all()
    assert set(np.flatnonzero(w)) == set(S)
    assert len(S) == len(set(S)) <= k
    assert (np.diff(found.objective_path_) < 0).all()
    first = S[found.layers_ == 1]
    ridge, chosen = ridge_of(A, alpha), np.where(np.isin(np.arange(len(w)), first), w, 0.0)
    assert found.objective_path_[0] == pytest.approx(0.5 * b @ b)
    # The last residual of an exact match is rounding, so it is compared with the target.
    assert found.residual_path_[-1] == pytest.approx(np.linalg.norm(A @ chosen - b) / np.linalg.norm(b), abs=1e-7)
    assert found.objective_path_[-1] == pytest.approx(objective(A, b, chosen, ridge), abs=1e-8 * (b @ b))
    if estimator in REFITTING:
        for layer in range(1, found.layers_.max(initial=0) + 1):
            atoms = S[found.layers_ == layer]
            assert violation(A, b, atoms, w[atoms], ridge) <= 1e-5
        assert found.kkt_ <= 1e-5


@SOME
@given(data=st.data())
def test_each_layer_matches_the_target_on_its_own(data):
    A, b = data.draw(problems())
    k, alpha = data.draw(budgets(A)), data.draw(st.sampled_from([1e-3, 0.3]))
    found = GradientTrajectoryPursuit(k, alpha=alpha).fit(A, b)
    assert (np.diff(found.layers_) >= 0).all()
    ridge = ridge_of(A, alpha)
    for layer in range(1, found.layers_.max(initial=0) + 1):
        S = found.support_[found.layers_ == layer]
        wide, long = np.vstack([A[:, S], np.sqrt(ridge) * np.eye(len(S))]), np.append(b, np.zeros(len(S)))
        expected, norm = scipy_nnls(wide, long)
        assert np.linalg.norm(wide @ found.coef_[S] - long) <= (1 + 1e-6) * norm
        last = [step for step in found.steps_ if step.layer == layer][-1]
        assert last.support_size == len(S)
        assert last.relative_residual == pytest.approx(
            np.linalg.norm(A[:, S] @ expected - b) / np.linalg.norm(b), abs=1e-4
        )


@SOME
@given(data=st.data(), copies=st.integers(2, 4))
def test_at_most_one_of_each_group_of_copies(data, copies):
    A, b = data.draw(problems(most=8))
    A = A[:, np.linalg.norm(A, axis=0) > 0]
    unit = A / np.linalg.norm(A, axis=0) if A.size else A
    if not A.size or (unit.T @ unit - np.eye(A.shape[1])).max() >= 0.999:
        return  # copies of one another, before any are made
    k = data.draw(st.integers(1, copies * A.shape[1]))
    found = GradientTrajectoryPursuit(k, alpha=data.draw(ALPHAS)).fit(np.tile(A, copies), b)
    groups = found.support_ % A.shape[1]
    assert len(set(groups)) == len(groups)
    assert all(copy % A.shape[1] == original % A.shape[1] for copy, original in found.copies_.items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@SOME
@given(seed=st.integers(0, 2**32 - 1), alpha=ALPHAS, k=st.integers(1, 12))
def test_permuting_the_pool_permutes_the_answer(estimator, seed, alpha, k, way):
    rng = np.random.default_rng(seed)
    A, b, order = rng.standard_normal((10, 20)) + 0.3, rng.standard_normal(10) + 0.3, rng.permutation(20)
    found, moved = estimator(k, alpha=alpha).fit(A, b), estimator(k, alpha=alpha).fit(A[:, order], b)
    np.testing.assert_array_equal(order[moved.support_], found.support_)
    np.testing.assert_allclose(moved.coef_, found.coef_[order], atol=1e-8 if way == "gram" else 1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@SOME
@given(seed=st.integers(0, 2**32 - 1), alpha=ALPHAS, k=st.integers(1, 12), power=st.integers(-60, 60))
def test_scaling_the_target_scales_the_weights(estimator, seed, alpha, k, power):
    rng = np.random.default_rng(seed)
    A, b = rng.standard_normal((10, 20)) + 0.3, rng.standard_normal(10) + 0.3
    found, scaled = estimator(k, alpha=alpha).fit(A, b), estimator(k, alpha=alpha).fit(A, 2.0**power * b)
    np.testing.assert_array_equal(scaled.support_, found.support_)
    np.testing.assert_allclose(scaled.coef_, 2.0**power * found.coef_, rtol=1e-9)
    np.testing.assert_allclose(scaled.residual_path_, found.residual_path_, rtol=1e-9)
    np.testing.assert_allclose(scaled.objective_path_, 4.0**power * found.objective_path_, rtol=1e-9)


@SOME
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 12))
def test_the_ridge_spans_matching_and_top_k_by_correlation(seed, k):
    rng = np.random.default_rng(seed)
    A, b = rng.standard_normal((10, 20)), rng.standard_normal(10)
    top = [i for i in np.argsort(-(A.T @ b))[:k] if A[:, i] @ b > 0]
    stop = {"saturation": "stop", "tol": 0.0}
    found = GradientTrajectoryPursuit(k, alpha=1e8, **stop).fit(A, b)
    # Pruning goes by contribution w‖a‖, so that with atoms of unlike length it is top-k by that.
    unit = A / np.linalg.norm(A, axis=0)
    ranked = [i for i in np.argsort(-(unit.T @ b))[:k] if unit[:, i] @ b > 0]
    assert set(GradientTrajectoryPursuit(k, alpha=1e8, **stop).fit(unit, b).support_) == set(ranked)
    assert set(NonNegativeOMP(k, alpha=1e8).fit(A, b).support_) == set(top)
    np.testing.assert_allclose(found.coef_ * ridge_of(A, 1e8), np.where(found.coef_ > 0, A.T @ b, 0.0), rtol=1e-4)
    pure = GradientTrajectoryPursuit(k, alpha=0.0, **stop).fit(A, b)
    _, norm = scipy_nnls(A[:, pure.support_], b)
    assert np.linalg.norm(A @ pure.coef_ - b) <= norm + 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@SOME
@given(data=st.data())
def test_every_budget_of_the_path(estimator, data):
    A, b, _, _, found = fitted(data, estimator)
    assert len(found.path_) == len(found.support_)
    for j in range(1, len(found.path_) + 1):
        part = found.path_[j]
        assert len(part.support) == len(set(part.support)) == len(part.weights) == len(part.layers) <= j
        assert (part.weights > 0).all()
        assert set(part.support) <= set(found.support_)
        first = part.layers == 1
        residual = A[:, part.support[first]] @ part.weights[first] - b
        assert part.relative_residual == pytest.approx(np.linalg.norm(residual) / np.linalg.norm(b), abs=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_against_every_support(alpha):
    """The objective in units of the best of all supports of at most k atoms, for N <= 12."""
    ratios = {estimator: [] for estimator in ESTIMATORS}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        D, N, k = int(rng.integers(4, 9)), int(rng.integers(6, 11)), int(rng.integers(2, 4))
        A, b = rng.standard_normal((D, N)) + 0.5, rng.standard_normal(D) + 0.5
        ridge = ridge_of(A, alpha)
        wide = np.vstack([A, np.sqrt(ridge) * np.eye(N)])
        long = np.append(b, np.zeros(N))
        best = min(scipy_nnls(wide[:, S], long)[1] ** 2 / 2 for S in itertools.combinations(range(N), k))
        for estimator, found in ratios.items():
            kwargs = {"saturation": "stop"} if estimator is GradientTrajectoryPursuit else {}
            made = estimator(k, alpha=alpha, **kwargs).fit(A, b)
            found.append(made.objective_path_[-1] / best)
    for estimator, found in ratios.items():
        assert min(found) >= 1 - 1e-9
        median, worst = {GradientTrajectoryPursuit: (1.02, 1.5), MatchingPursuit: (1.2, 2.5)}.get(
            estimator, (1.05, 2.0)
        )
        assert np.median(found) <= median, (estimator, sorted(found))
        assert max(found) <= worst, (estimator, sorted(found))


def nnls_of_columns(A, b, ridge, tol=1e-10):
    """`nnls_columns` on explicit columns, from zero."""
    lengths = np.sqrt(np.sum(A**2, axis=0) + ridge)
    basis = np.linalg.qr(A @ np.random.default_rng(0).standard_normal((A.shape[1], 3)))[0]
    columns = Columns(Rows([A.T], "the test"), np.arange(A.shape[1]), ridge, lengths, A.T @ basis)
    return nnls_columns(columns, b, A.T @ b, np.zeros(A.shape[1]), Tolerance(tol))


@SOME
@given(data=st.data(), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
def test_both_least_squares_against_scipy(data, ridge):
    A, b = data.draw(problems(most=40))
    A = A[:, np.linalg.norm(A, axis=0) > 0]
    if not A.size:
        return
    wide, long = np.vstack([A, np.sqrt(ridge) * np.eye(A.shape[1])]), np.append(b, np.zeros(A.shape[1]))
    _, norm = scipy_nnls(wide, long, maxiter=10_000)
    by_gram = nnls(A.T @ A, A.T @ b, ridge=ridge, tol=1e-10)
    by_columns, residual = nnls_of_columns(A, b, ridge)
    for x in (by_gram.x, by_columns.x):
        assert (x >= 0).all()
        assert np.linalg.norm(wide @ x - long) ** 2 <= norm**2 + 1e-8 * (b @ b)
    np.testing.assert_allclose(residual, b - A @ by_columns.x, atol=1e-9 * np.linalg.norm(b))
    assert by_gram.kkt <= 1e-8
    assert by_columns.kkt <= 1e-6
