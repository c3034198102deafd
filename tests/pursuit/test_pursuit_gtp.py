"""Gradient Trajectory Pursuit: what it must find, and what must not change what it finds."""

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy.optimize import nnls as scipy_nnls
from sklearn.base import clone

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import (
    DenseMatrix,
    GradientTrajectoryPursuit,
    NonNegativeOMP,
    TrajectoryMatrix,
    kkt_violation,
)
from gradpursuit.pursuit import problem as problem_module

EXACT = 1e-8  # of a refit by Gram matrix


@pytest.fixture(params=["gram", "columns"])
def precision(request, monkeypatch):
    """Both ways of refitting, and the KKT violation that each keeps below."""
    if request.param == "gram":
        return EXACT
    monkeypatch.setattr(problem_module, "GRAM_COLUMNS", 0)
    return 1e-6


def low_rank(seed, D=200, N=400, rank=20, noise=0.5, decay=0.5):
    """Unit columns of a low-rank matrix plus noise, and a target near the mean of some of them."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((D, rank)) * np.arange(1, rank + 1) ** -decay
    A = factors @ (rng.standard_normal((rank, N)) + 0.3) / np.sqrt(rank) + noise * rng.standard_normal((D, N))
    A /= np.linalg.norm(A, axis=0)
    b = A[:, rng.choice(N, 40, replace=False)].mean(1) + 0.01 * rng.standard_normal(D)
    return A, b


def planted(seed, k=8, N=300, dtype=np.float64):
    rng = np.random.default_rng(seed)
    D = int(4 * k * np.log(N))
    A = rng.standard_normal((D, N)).astype(dtype)
    w = np.zeros(N)
    w[rng.choice(N, k, replace=False)] = rng.uniform(0.5, 2.0, k)
    return A, A.astype(np.float64) @ w, w


def objective(A, b, w, alpha):
    return 0.5 * np.sum((A @ w - b) ** 2) + 0.5 * alpha * np.mean(np.sum(A**2, axis=0)) * np.sum(w**2)


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_exact_recovery(dtype, tol, precision):
    for seed in range(10):
        A, b, w = planted(seed, dtype=dtype)
        found = GradientTrajectoryPursuit(8, alpha=0.0).fit(A, b)
        assert set(found.support_) == set(np.flatnonzero(w))
        np.testing.assert_allclose(found.coef_, w, atol=max(tol, 0.0 if precision == EXACT else 10 * precision))
        # Without a Gram matrix the last bit is often only matched when the weights are polished.
        assert found.stop_reason_[0] == "target matched" or (precision > EXACT and found.stop_reason_ == ["converged"])
        assert found.residual_path_[-1] <= 1e-6


def test_close_to_the_best_subset(precision):
    ratios = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((8, 12)) + 0.5
        b = rng.standard_normal(8) + 0.5
        best = min(0.5 * scipy_nnls(A[:, list(subset)], b)[1] ** 2 for subset in itertools.combinations(range(12), 3))
        found = GradientTrajectoryPursuit(3, alpha=0.0, saturation="stop").fit(A, b)
        assert len(found.support_) <= 3
        ratios.append(found.objective_path_[-1] / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) <= 1.01
    assert max(ratios) <= 1.5


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_no_worse_than_one_atom_at_a_time(alpha, precision):
    for seed, (k, rank, noise) in enumerate(itertools.product((4, 12, 40), (10, 50), (0.1, 1.0))):
        A, b = low_rank(seed, rank=rank, noise=noise)
        joint = GradientTrajectoryPursuit(k, alpha=alpha, saturation="stop").fit(A, b)
        greedy = NonNegativeOMP(k, alpha=alpha).fit(A, b)
        assert joint.residual_path_[-1] <= 1.05 * greedy.residual_path_[-1]
        assert joint.n_iter_ <= 25


@pytest.mark.parametrize("alpha", [0.0, 0.3, 10.0])
def test_paths_weights_and_optimality(alpha, precision):
    for seed in range(4):
        A, b = low_rank(seed)
        found = GradientTrajectoryPursuit(25, alpha=alpha).fit(A, b)
        S, w = found.support_, found.coef_
        ridge = alpha * np.mean(np.sum(A**2, axis=0))
        assert (np.diff(found.objective_path_) < 0).all()
        assert found.residual_path_[0] == pytest.approx(1.0)
        assert found.objective_path_[0] == pytest.approx(0.5 * b @ b)
        assert found.objective_path_[-1] == pytest.approx(objective(A, b, w, alpha), rel=1e-9)
        assert found.residual_path_[-1] == pytest.approx(np.linalg.norm(A @ w - b) / np.linalg.norm(b), rel=1e-9)
        assert (w >= 0).all()
        assert set(np.flatnonzero(w)) == set(S)
        assert len(S) == len(set(S)) == 25
        assert kkt_violation(A[:, S].T @ A[:, S], A[:, S].T @ b, w[S], ridge) <= precision
        assert found.kkt_ <= precision
        contribution = w[S] * np.linalg.norm(A[:, S], axis=0)
        assert (np.diff(contribution) <= 0).all()
        assert found.steps_[-1].objective == found.objective_path_[-1]
        assert [step.iteration for step in found.steps_] == list(range(len(found.steps_)))
        np.testing.assert_allclose(found.predict(A), A @ w, atol=1e-12)


def test_a_large_ridge_is_top_k_by_correlation(precision):
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(30, alpha=1e7).fit(A, b)
    assert set(found.support_) == set(np.argsort(-(A.T @ b))[:30])


def test_permuting_the_pool_permutes_the_answer(precision):
    A, b = low_rank(1)
    order = np.random.default_rng(0).permutation(A.shape[1])
    found = GradientTrajectoryPursuit(30).fit(A, b)
    moved = GradientTrajectoryPursuit(30).fit(A[:, order], b)
    np.testing.assert_array_equal(order[moved.support_], found.support_)
    np.testing.assert_allclose(moved.coef_, found.coef_[order], rtol=1e-8)


@pytest.mark.parametrize("factor", [1e-30, 3e-3, 7e12])
def test_scaling_the_target_scales_the_weights(factor, precision):
    A, b = low_rank(2)
    A = A.astype(np.float32)
    found = GradientTrajectoryPursuit(30).fit(A, b)
    scaled = GradientTrajectoryPursuit(30).fit(A, factor * b)
    np.testing.assert_array_equal(scaled.support_, found.support_)
    np.testing.assert_allclose(scaled.coef_, factor * found.coef_, rtol=1e-6)
    np.testing.assert_allclose(scaled.residual_path_, found.residual_path_, rtol=1e-6)
    np.testing.assert_allclose(scaled.objective_path_, factor**2 * found.objective_path_, rtol=1e-6)


def test_same_input_same_answer_and_ties_go_to_the_lower_id(precision):
    A, b = low_rank(3)
    first, second = (GradientTrajectoryPursuit(20).fit(A, b) for _ in range(2))
    np.testing.assert_array_equal(first.coef_, second.coef_)
    tied = GradientTrajectoryPursuit(2, max_coherence=None).fit(np.eye(4), np.array([1.0, 2.0, 1.0, 2.0]))
    np.testing.assert_array_equal(tied.support_, [1, 3])
    four = GradientTrajectoryPursuit(2).fit(np.eye(4), np.ones(4))
    np.testing.assert_array_equal(four.support_, [0, 1])


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("k", [10, 60, 150])
def test_of_copies_one_is_chosen(alpha, k, precision):
    A, b = low_rank(4, N=100)
    rng = np.random.default_rng(0)
    copied = np.tile(A, 3) * rng.uniform(0.5, 2.0, 300)
    copied += 1e-6 * np.linalg.norm(copied, axis=0) * rng.standard_normal(copied.shape) / np.sqrt(len(A))
    found = GradientTrajectoryPursuit(k, alpha=alpha).fit(copied, b)
    groups = found.support_ % 100
    assert len(set(groups)) == len(groups) >= min(k, 45)
    assert all(copy % 100 == original % 100 for copy, original in found.copies_.items())
    assert not set(found.copies_) & set(found.support_)
    assert not set(found.copies_) & set(found.copies_.values())
    assert found.copies_
    if k == 150:  # more than there are distinct atoms
        assert len(groups) < 100
        assert found.stop_reason_[-1] == "no positive correlation"


def test_copies_are_allowed_on_request():
    A, b = low_rank(4, N=100)
    found = GradientTrajectoryPursuit(30, max_coherence=None).fit(np.tile(A, 3), b)
    assert found.copies_ == {}
    assert len(set(found.support_ % 100)) < 30


def test_a_copy_of_a_chosen_atom_gives_way_and_among_others_the_lower_id_stays(precision):
    a, c = np.array([1.0, 0.1, 0.0]), np.array([0.2, 1.0, 0.5])
    A = np.stack([c, 3 * a, a, 2 * c, 0.5 * a], axis=1)
    found = GradientTrajectoryPursuit(2).fit(A, np.array([1.0, 0.8, 0.2]))
    # One candidate at a time: the longest of each group is the first that is seen.
    assert sorted(found.support_) == [1, 3]
    assert found.copies_ == {0: 3, 2: 1, 4: 1}


def test_among_candidates_seen_together_the_lower_id_stays(precision):
    a, c = np.array([1.0, 0.1, 0.0, 0.0]), np.array([0.2, 1.0, 0.5, 0.0])
    rest = np.eye(4)[:, [2, 3]].repeat(4, axis=1) + 0.3 * np.random.default_rng(0).standard_normal((4, 8))
    A = np.column_stack([c, 3 * a, a, 2 * c, 0.5 * a, rest])
    found = GradientTrajectoryPursuit(12).fit(A, np.array([1.0, 0.8, 0.2, 0.1]))
    copies = {copy: of for copy, of in found.copies_.items() if copy < 5}
    assert set(copies) | set(copies.values()) == {0, 1, 2, 3, 4}


def fan(degrees):
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)])


def test_layers_by_hand(precision):
    # All atoms lie on one side of the target: only the nearest of those left can have a weight.
    A = fan([30, 10, 50, 100, 70, 10.5])
    found = GradientTrajectoryPursuit(5, alpha=0.0).fit(A, np.array([2.0, 0.0]))
    np.testing.assert_array_equal(found.support_, [1, 0, 2, 4])
    np.testing.assert_array_equal(found.layers_, [1, 2, 3, 4])
    np.testing.assert_allclose(found.coef_, 2 * np.cos(np.deg2rad([30, 10, 50, 90, 70, 90])), atol=1e-12)
    assert found.copies_ == {5: 1}
    assert found.stop_reason_ == ["no positive correlation"] * 5
    np.testing.assert_allclose(found.residual_path_, [1, np.sin(np.deg2rad(10))])
    assert [step.layer for step in found.steps_] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(GradientTrajectoryPursuit(2, alpha=0.0).fit(A, np.array([2.0, 0.0])).support_) == 2


def test_a_copy_first_seen_in_a_later_layer_is_recognised(precision):
    # The last atom is a short copy of the first: too small to be a candidate until the second layer's residual.
    A = np.column_stack([fan([0, 40, 50, 60]), [0.01, 0.0]])
    found = GradientTrajectoryPursuit(2, alpha=0.0).fit(A, np.array([1.0, 0.0]))
    np.testing.assert_array_equal(found.support_, [0, 1])
    np.testing.assert_array_equal(found.layers_, [1, 2])
    assert found.copies_ == {4: 0}


def test_saturation_stop_returns_fewer(precision):
    A = fan([30, 10, 50, 100, 70])
    found = GradientTrajectoryPursuit(4, alpha=0.0, saturation="stop").fit(A, np.array([2.0, 0.0]))
    np.testing.assert_array_equal(found.support_, [1])
    np.testing.assert_array_equal(found.layers_, [1])
    assert found.stop_reason_ == ["no positive correlation"]


def test_each_layer_matches_the_target_on_its_own(precision):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        A, b = rng.standard_normal((60, 80)), rng.standard_normal(60)
        found = GradientTrajectoryPursuit(60, alpha=1e-3).fit(A, b)
        assert len(set(found.support_)) == len(found.support_) > 40
        assert (np.diff(found.layers_) >= 0).all()
        assert set(found.layers_) == set(range(1, found.layers_.max() + 1))
        assert found.layers_.max() >= 2
        ridge = 1e-3 * np.mean(np.sum(A**2, axis=0))
        for layer in range(1, found.layers_.max() + 1):
            S = found.support_[found.layers_ == layer]
            wide = np.vstack([A[:, S], np.sqrt(ridge) * np.eye(len(S))])
            expected, _ = scipy_nnls(wide, np.append(b, np.zeros(len(S))))
            np.testing.assert_allclose(found.coef_[S], expected, atol=10 * precision)  # of a violation, not of weights
            last = [step for step in found.steps_ if step.layer == layer][-1]
            norm = np.linalg.norm(A[:, S] @ expected - b)
            assert last.relative_residual == pytest.approx(norm / np.linalg.norm(b), abs=precision)
            assert last.support_size == len(S)


def test_no_positive_correlation_is_an_empty_support(precision):
    found = GradientTrajectoryPursuit(2).fit(-np.abs(np.random.default_rng(0).standard_normal((5, 6))), np.ones(5))
    assert found.support_.shape == found.layers_.shape == (0,)
    assert not found.coef_.any()
    assert found.stop_reason_ == ["no positive correlation"]
    np.testing.assert_allclose(found.residual_path_, [1.0])
    assert not found.predict(np.ones((5, 6))).any()


def test_zero_columns_are_never_chosen(precision):
    A, b = low_rank(5, N=50)
    A[:, ::2] = 0.0
    found = GradientTrajectoryPursuit(50).fit(A, b)
    assert len(found.support_) > 10
    assert (found.support_ % 2 == 1).all()


def test_iteration_limit_is_told():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(30, max_iter=1).fit(A, b)
    assert found.stop_reason_[0] == "iteration limit"
    assert len(found.residual_path_) == 2


def test_all_kinds_of_matrix_give_the_same_answer():
    A, b = low_rank(6)
    half = A.T.astype(np.float16)
    expected = GradientTrajectoryPursuit(20).fit(half.astype(np.float64).T, b)
    blocks = [np.split(half[:, :90], [37, 200]), [half[:, 90:]]]
    for X in (
        TrajectoryMatrix(blocks),
        DenseMatrix(half.T),
        torch.from_numpy(half).T,
        torch.from_numpy(half.astype(np.float32)).T,
    ):
        found = GradientTrajectoryPursuit(20).fit(X, torch.from_numpy(b))
        np.testing.assert_array_equal(found.support_, expected.support_)
        np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-6)


def test_reads_the_matrix_once_for_each_iteration_and_never_a_column_twice_in_a_row():
    A, b = low_rank(7)

    class Counting(DenseMatrix):
        passes, fetched = 0, 0

        def correlate(self, r):
            self.passes += 1
            return super().correlate(r)

        def columns(self, ids):
            self.fetched += len(ids)
            assert len(set(ids)) == len(ids)
            return super().columns(ids)

    X = Counting(A)
    found = GradientTrajectoryPursuit(20).fit(X, b)
    assert X.passes == found.n_iter_
    assert X.fetched < 40 * found.n_iter_  # kept candidates are not fetched again


def test_estimator_conventions():
    made = GradientTrajectoryPursuit(7, alpha=0.1, max_iter=9, tol=1e-3, saturation="stop", max_coherence=None)
    parameters = {
        "n_nonzero_coefs": 7,
        "alpha": 0.1,
        "max_iter": 9,
        "tol": 1e-3,
        "saturation": "stop",
        "max_coherence": None,
        "targets": "mean",
        "warm_start": False,
    }
    assert made.get_params() == parameters
    A, b = low_rank(0)
    assert made.fit(A, b) is made
    assert made.n_features_in_ == A.shape[1]
    assert 0 < made.score(A, b) < 1
    copy = clone(made)
    assert copy.get_params() == made.get_params() == parameters
    assert not hasattr(copy, "coef_")


def test_progress_is_logged(caplog):
    A, b = low_rank(0)
    with caplog.at_level(logging.INFO, logger="gradpursuit"):
        found = GradientTrajectoryPursuit(10).fit(A, b)
    assert len(caplog.records) == len(found.steps_)


@pytest.mark.parametrize("estimator", [GradientTrajectoryPursuit, NonNegativeOMP])
@pytest.mark.parametrize(
    ("k", "X", "y", "message"),
    [
        (0, np.eye(3), np.ones(3), "n_nonzero_coefs is 0"),
        (2.5, np.eye(3), np.ones(3), "n_nonzero_coefs is 2.5"),
        (4, np.eye(3), np.ones(3), "only 3 examples"),
        (1, np.eye(3), np.zeros(3), "target gradient is zero"),
        (1, np.eye(3), np.ones(4), r"shape \(4,\)"),
        (1, np.eye(3), np.ones((3, 1, 1)), r"shape \(3, 1, 1\)"),
        (1, np.eye(3), np.array([1.0, np.nan, 0.0]), "nan at index 1"),
        (1, np.diag([1.0, np.inf, 1.0]), np.ones(3), "first is atom 1"),
        (1, np.ones(3), np.ones(3), r"shape \(3,\)"),
    ],
)
def test_refused_numbers(estimator, k, X, y, message):
    with pytest.raises(PursuitError, match=message):
        estimator(k).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": np.nan}, "alpha is nan"),
        ({"tol": -1.0}, "tol is -1"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"saturation": "layer"}, "did you mean 'layers'"),
        ({"max_coherence": 0.0}, "max_coherence is 0.0"),
        ({"max_coherence": 1.5}, "max_coherence is 1.5"),
    ],
)
def test_refused_parameters(options, message):
    with pytest.raises(PursuitError, match=message):
        GradientTrajectoryPursuit(1, **options).fit(np.eye(3), np.ones(3))


def test_predict_wants_the_same_pool():
    found = GradientTrajectoryPursuit(1).fit(np.eye(3), np.ones(3))
    with pytest.raises(PursuitError, match="4 columns"):
        found.predict(np.ones((3, 4)))
