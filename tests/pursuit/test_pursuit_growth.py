"""Going on from an earlier pursuit: with a larger budget, and with new atoms."""

import pickle

import numpy as np
import pytest
from test_pursuit_gtp import fan, low_rank

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import DenseMatrix, GradientMatrix, GradientTrajectoryPursuit, JoinedMatrix, kkt_violation


class Counting(DenseMatrix):
    """Counts passes and remembers which columns were fetched."""

    def __init__(self, X):
        super().__init__(X)
        self.forget()

    def forget(self):
        self.passes, self.fetched = 0, set()

    def correlate(self, r):
        self.passes += 1
        return super().correlate(r)

    def columns(self, ids):
        self.fetched |= set(ids.tolist())
        return super().columns(ids)


def assert_valid(found, A, b, k, alpha=0.3):
    S, w = found.support_, found.coef_
    ridge = alpha * np.mean(np.sum(A**2, axis=0))
    assert w.shape == (A.shape[1],)
    assert len(set(S)) == len(S) <= k
    assert set(np.flatnonzero(w)) == set(S)
    assert (w >= 0).all()
    for layer in set(found.layers_):
        T = S[found.layers_ == layer]
        assert kkt_violation(A[:, T].T @ A[:, T], A[:, T].T @ b, w[T], ridge) <= 1e-8
    first = S[found.layers_ == 1]
    residual = np.linalg.norm(A[:, first] @ w[first] - b) / np.linalg.norm(b)
    assert found.residual_path_[-1] == pytest.approx(residual, rel=1e-8)


def test_a_warm_start_costs_fewer_passes_for_nearly_the_same_residual():
    """From k = 20 to 40: never 5 % worse than cold, 1 % on average, for fewer passes."""
    ratios, warm_passes, cold_passes = [], 0, 0
    for seed in range(6):
        A, b = low_rank(seed)
        for alpha in (0.0, 0.3):
            cold = GradientTrajectoryPursuit(40, alpha=alpha, saturation="stop").fit(A, b)
            warm = GradientTrajectoryPursuit(20, alpha=alpha, saturation="stop", warm_start=True).fit(A, b)
            small = set(warm.support_)
            before = warm.objective_path_[-1]
            warm.set_params(n_nonzero_coefs=40).fit(A, b)
            assert_valid(warm, A, b, 40, alpha)
            assert len(warm.support_) == 40
            assert len(small & set(warm.support_)) >= 10
            assert warm.steps_[0].support_size == 20
            assert warm.objective_path_[0] == pytest.approx(before, rel=1e-8)
            assert (np.diff(warm.objective_path_) < 0).all()
            ratios.append(warm.residual_path_[-1] / cold.residual_path_[-1])
            warm_passes, cold_passes = warm_passes + warm.n_iter_, cold_passes + cold.n_iter_
    assert max(ratios) <= 1.05
    assert np.mean(ratios) <= 1.01
    assert warm_passes <= 0.9 * cold_passes


def test_a_warm_start_from_the_answer_never_makes_it_worse():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(30, saturation="stop", warm_start=True).fit(A, b)
    for _ in range(20):
        before, support = found.objective_path_[-1], found.support_
        found.fit(A, b)
        assert found.objective_path_[0] == pytest.approx(before, rel=1e-9)
        assert found.objective_path_[-1] <= before * (1 + 1e-9)
        if len(found.residual_path_) == 1:
            break
    assert len(found.residual_path_) == 1  # nothing more to find
    np.testing.assert_array_equal(found.support_, support)


def test_without_warm_start_a_second_fit_is_a_first_one():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(20).fit(A, b).set_params(n_nonzero_coefs=40).fit(A, b)
    np.testing.assert_array_equal(found.coef_, GradientTrajectoryPursuit(40).fit(A, b).coef_)


@pytest.mark.parametrize(
    "changed", [{"n_nonzero_coefs": 10}, {"alpha": 1.0}, {"saturation": "stop"}, {"targets": "balanced"}]
)
def test_a_warm_start_with_something_else_changed(changed):
    A, b = low_rank(1)
    y = np.stack([b, A[:, :5].mean(axis=1)], axis=1)
    found = GradientTrajectoryPursuit(25, warm_start=True).fit(A, y).set_params(**changed).fit(A, y)
    cold = GradientTrajectoryPursuit(**found.get_params()).fit(A, y)
    assert len(found.support_) <= found.n_nonzero_coefs
    assert found.kkt_ <= 1e-8
    assert found.objective_path_[-1] <= 1.1 * cold.objective_path_[-1]


def test_a_warm_start_towards_another_target():
    A, b = low_rank(2)
    found = GradientTrajectoryPursuit(25, warm_start=True).fit(A, A[:, :50].mean(axis=1)).fit(A, b)
    cold = GradientTrajectoryPursuit(25).fit(A, b)
    assert_valid(found, A, b, 25)
    assert found.residual_path_[-1] <= 1.05 * cold.residual_path_[-1]


def test_a_warm_start_with_layers_chooses_nothing_twice():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((60, 80)), rng.standard_normal(60)
    A = np.concatenate([A, A * rng.uniform(0.5, 2, 80)], axis=1)
    found = GradientTrajectoryPursuit(30, alpha=1e-3, warm_start=True).fit(A, b)
    found.set_params(n_nonzero_coefs=70).fit(A, b)
    assert found.layers_.max() >= 2
    assert len(found.support_) > 40
    assert_valid(found, A, b, 70, 1e-3)
    assert len(set(found.support_ % 80)) == len(found.support_)
    assert not set(found.copies_) & set(found.support_)


def test_extend_reads_only_new_atoms_and_chosen_old_ones():
    A, b = low_rank(0)
    old, new = Counting(A[:, :300]), Counting(A[:, 300:])
    found = GradientTrajectoryPursuit(30).fit(old, b)
    chosen, bytes_before = set(found.support_), old.nbytes
    old.forget()
    steps = []
    assert found.extend(new, lambda step, support: steps.append(step)) is found
    assert old.passes == 0
    assert old.fetched <= chosen
    assert new.passes == found.n_iter_
    assert found.n_features_in_ == 400
    assert_valid(found, A, b, 30)
    assert set(found.support_[found.support_ < 300]) <= chosen
    assert (found.support_ >= 300).any()
    assert steps[-1].bytes_read < bytes_before + 10 * new.nbytes
    np.testing.assert_allclose(found.predict(A), A @ found.coef_, atol=1e-12)


def test_extend_is_close_to_a_fresh_pursuit_of_all():
    """Within 10 % of the residual of a fresh one, 4.5 % on average; the pursuit of the old atoms alone is worse."""
    extended, twice, nothing = [], [], []
    for seed in range(3):
        A, b = low_rank(seed)
        for alpha in (0.0, 0.3):
            make = lambda alpha=alpha: GradientTrajectoryPursuit(40, alpha=alpha, saturation="stop")  # noqa: E731
            fresh = make().fit(A, b).residual_path_[-1]
            found = make().fit(A[:, :300], b)
            before = found.residual_path_[-1]
            nothing.append(before / fresh)
            found.extend(A[:, 300:])
            if alpha == 0.0:  # with a ridge, its size changes with the mean norm
                assert found.residual_path_[-1] <= before
            extended.append(found.residual_path_[-1] / fresh)
            found = make().fit(A[:, :200], b).extend(A[:, 200:300]).extend(A[:, 300:])
            assert found.n_features_in_ == 400
            assert_valid(found, A, b, 40, alpha)
            twice.append(found.residual_path_[-1] / fresh)
    for ratios in (extended, twice):
        assert max(ratios) <= 1.10
        assert np.mean(ratios) <= 1.045
    assert np.mean(nothing) > 1.07


def test_extend_with_atoms_that_match():
    A, b = low_rank(3)
    found = GradientTrajectoryPursuit(5, alpha=0.0, saturation="stop").fit(A, b).extend(np.stack([-b, 2 * b], axis=1))
    np.testing.assert_array_equal(found.support_, [401])
    assert found.coef_[401] == pytest.approx(0.5)
    assert found.residual_path_[-1] < 1e-6


def test_extend_with_nothing_of_use_keeps_the_answer():
    A, b = low_rank(3)
    found = GradientTrajectoryPursuit(5, alpha=0.0).fit(A, b)
    coef = found.coef_
    found.extend(-b[:, None])
    np.testing.assert_allclose(found.coef_, np.append(coef, 0.0), rtol=1e-8)
    assert found.stop_reason_ == ["no positive correlation"]


def test_copies_of_chosen_atoms_among_the_new_are_set_aside():
    A, b = low_rank(4)
    found = GradientTrajectoryPursuit(20).fit(A, b)
    chosen = found.support_
    found.extend(2 * A[:, chosen])
    np.testing.assert_array_equal(np.sort(found.support_), np.sort(chosen))
    assert found.copies_
    assert all(chosen[copy - 400] == original for copy, original in found.copies_.items() if copy >= 400)
    known = dict(found.copies_)
    found.extend(A[:, 1:30] + A[:, 101:130])
    assert known.items() <= found.copies_.items()
    assert not set(found.support_) & set(known)


def test_extend_may_grow_the_budget():
    A, b = low_rank(5)
    found = GradientTrajectoryPursuit(10, saturation="stop").fit(A[:, :200], b)
    found.set_params(n_nonzero_coefs=30).extend(A[:, 200:])
    assert len(found.support_) == 30
    default = GradientTrajectoryPursuit().fit(A[:, :200], b)
    assert len(default.support_) == 20
    assert len(default.extend(A[:, 200:]).support_) == 40  # a tenth of all


def test_extend_goes_on_with_layers():
    # As in the test of layers by hand; the new atom at 5 degrees replaces the first layer's, at 10.
    found = GradientTrajectoryPursuit(2, alpha=0.0).fit(fan([30, 10, 50]), np.array([2.0, 0.0]))
    np.testing.assert_array_equal(found.support_, [1, 0])
    found.extend(fan([60, 5, 70]))
    np.testing.assert_array_equal(found.support_, [4, 0])
    np.testing.assert_array_equal(found.layers_, [1, 2])
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((60, 160)), rng.standard_normal(60)
    found = GradientTrajectoryPursuit(80, alpha=1e-3).fit(A[:, :80], b).extend(A[:, 80:])
    assert found.layers_.max() >= 2
    assert_valid(found, A, b, 80, 1e-3)


@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_extend_with_several_targets(targets):
    A, b = low_rank(0)
    y = np.stack([b, 5 * A[:, 300:310].mean(axis=1)], axis=1)
    found = GradientTrajectoryPursuit(30, targets=targets, saturation="stop").fit(A[:, :300], y)
    before = found.group_residuals_
    found.extend(A[:, 300:])
    assert found.group_residuals_[1] < 0.8 * before[1]
    assert found.kkt_ <= 1e-8
    assert len(found.support_) <= 30


def test_extend_then_a_warm_fit_to_all():
    A, b = low_rank(1)
    found = GradientTrajectoryPursuit(40, saturation="stop", warm_start=True).fit(A[:, :300], b).extend(A[:, 300:])
    part = found.objective_path_[-1]
    found.fit(A, b)
    assert found.objective_path_[0] == pytest.approx(part, rel=1e-8)
    assert found.objective_path_[-1] <= part


def test_refusals():
    A, b = low_rank(0)
    with pytest.raises(PursuitError, match="call fit first, in the same process"):
        GradientTrajectoryPursuit(3).extend(A)
    found = GradientTrajectoryPursuit(3, warm_start=True).fit(A, b)
    coef = found.coef_
    with pytest.raises(PursuitError, match="the new atoms have 199 entries and the old ones 200"):
        found.extend(A[1:])
    with pytest.raises(PursuitError, match="first is atom 2"):
        found.extend(np.where(np.arange(5) == 2, np.nan, A[:, :5]))
    with pytest.raises(PursuitError, match=r"shape \(200,\)"):
        found.extend(b)
    np.testing.assert_array_equal(found.coef_, coef)
    with pytest.raises(PursuitError, match="X has 300 features"):
        found.fit(A[:, :300], b)
    with pytest.raises(PursuitError, match="same process"):
        pickle.loads(pickle.dumps(found)).extend(A)
    cold = pickle.loads(pickle.dumps(found)).fit(A, b)  # nothing to begin from: from the start
    assert cold.residual_path_[0] == pytest.approx(1.0)


@pytest.mark.parametrize("read_all", [True, False])
def test_joined_matrix(read_all):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((7, 4)), rng.standard_normal((7, 5)).astype(np.float32)
    made, whole = JoinedMatrix(DenseMatrix(A), DenseMatrix(B), read_all=read_all), np.concatenate([A, B], axis=1)
    assert isinstance(made, GradientMatrix)
    assert made.shape == (7, 9)
    assert made.nbytes == B.nbytes + read_all * A.nbytes
    seen = whole if read_all else np.concatenate([0 * A, B], axis=1)
    R = rng.standard_normal((7, 3))
    np.testing.assert_allclose(made.correlate(R), seen.T @ R, atol=1e-5)
    np.testing.assert_allclose(made.correlate(R[:, 0]), seen.T @ R[:, 0], atol=1e-5)
    np.testing.assert_allclose(made.squared_norms(), (whole**2).sum(axis=0), rtol=1e-5)
    for ids in (np.array([8, 0, 5, 3]), np.array([1, 2]), np.array([7]), np.array([], dtype=np.int64)):
        x = rng.standard_normal(len(ids))
        np.testing.assert_array_equal(made.columns(ids), whole[:, ids])
        np.testing.assert_allclose(made.combine(ids, x), whole[:, ids] @ x, atol=1e-12)
    with pytest.raises(PursuitError):
        made.columns(np.array([9]))
    with pytest.raises(PursuitError, match=r"0\.\.8|-1"):
        made.columns(np.array([-1]))
