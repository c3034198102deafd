"""Every budget from one pursuit, and where more atoms stop helping."""

import pickle

import numpy as np
import pytest
from test_pursuit_gtp import fan, low_rank

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import (
    DenseMatrix,
    GradientTrajectoryPursuit,
    MatchingPursuit,
    NonNegativeOMP,
    TrajectoryMatrix,
    kkt_violation,
)
from gradpursuit.pursuit import problem as problem_module


class Counting(DenseMatrix):
    passes = 0

    def correlate(self, r):
        self.passes += 1
        return super().correlate(r)


def assert_optimal(A, b, subset, alpha, tol=1e-8):
    S = subset.support
    ridge = alpha * np.mean(np.sum(A**2, axis=0))
    for layer in set(subset.layers):
        at = subset.layers == layer
        T, w = S[at], subset.weights[at]
        assert kkt_violation(A[:, T].T @ A[:, T], A[:, T].T @ b, w, ridge) <= tol
    first = subset.layers == 1
    r = b - A[:, S[first]] @ subset.weights[first]
    assert subset.relative_residual == pytest.approx(np.linalg.norm(r) / np.linalg.norm(b), rel=1e-6)
    expected = 0.5 * r @ r + 0.5 * ridge * np.sum(subset.weights[first] ** 2)
    assert subset.objective == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_every_budget_without_another_pass(alpha):
    A, b = low_rank(0)
    X = Counting(A)
    found = GradientTrajectoryPursuit(40, alpha=alpha).fit(X, b)
    made = X.passes
    for budget in range(1, 41):
        subset = found.path_[budget]
        assert 0 < len(subset.support) <= budget
        assert len(set(subset.support)) == len(subset.support)
        assert set(subset.support) <= set(found.support_)
        assert (subset.weights > 0).all()
        assert_optimal(A, b, subset, alpha)
    assert found.knee().budget in found.path_.budgets
    assert X.passes == made
    grid = list(found.path_)
    assert [budget for budget, _ in grid] == found.path_.budgets
    assert found.path_.budgets[0] == 1
    assert found.path_.budgets[-1] == 40
    assert (np.diff([subset.objective for _, subset in grid]) < 0).all()
    assert (np.diff([subset.relative_residual for _, subset in grid]) < 0).all()
    for budget in (40, 1000):
        np.testing.assert_array_equal(found.path_[budget].support, found.support_)
        np.testing.assert_array_equal(found.path_[budget].layers, found.layers_)
        np.testing.assert_array_equal(found.path_[budget].weights, found.coef_[found.support_])


def test_without_a_gram_matrix(monkeypatch):
    monkeypatch.setattr(problem_module, "GRAM_COLUMNS", 0)
    A, b = low_rank(1)
    found = GradientTrajectoryPursuit(40).fit(A, b)
    assert (np.diff([subset.objective for _, subset in found.path_]) < 0).all()
    for budget in (1, 7, 23, 40):
        assert_optimal(A, b, found.path_[budget], 0.3, tol=1e-5)


def test_close_to_a_fresh_pursuit():
    """The residual for a budget is within 15 % of that of a pursuit for this very budget, and within 4 % on average."""
    ratios = []
    for seed in range(3):
        A, b = low_rank(seed)
        for alpha in (0.0, 0.3):
            whole = GradientTrajectoryPursuit(40, alpha=alpha, saturation="stop").fit(A, b)
            for k in (2, 5, 10, 20, 30):
                fresh = GradientTrajectoryPursuit(k, alpha=alpha, saturation="stop").fit(A, b)
                ratios.append(whole.path_[k].relative_residual / fresh.residual_path_[-1])
    assert max(ratios) <= 1.15
    assert np.mean(ratios) <= 1.04


def test_layers_by_hand():
    A = fan([30, 10, 50, 100, 70])
    found = GradientTrajectoryPursuit(4, alpha=0.0).fit(A, np.array([2.0, 0.0]))
    assert found.path_.budgets == [1, 2, 3, 4]
    for budget in range(1, 5):
        np.testing.assert_array_equal(found.path_[budget].support, [1, 0, 2, 4][:budget])
        np.testing.assert_array_equal(found.path_[budget].layers, [1, 2, 3, 4][:budget])
        np.testing.assert_allclose(found.path_[budget].weights, 2 * np.cos(np.deg2rad([10, 30, 50, 70]))[:budget])
        assert found.path_[budget].relative_residual == pytest.approx(np.sin(np.deg2rad(10)))


def test_layers_fill_one_after_the_other():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((60, 80)), rng.standard_normal(60)
    found = GradientTrajectoryPursuit(60, alpha=1e-3).fit(A, b)
    sizes = np.bincount(found.layers_)[1:]
    assert len(sizes) >= 2
    assert set(np.cumsum(sizes)) <= set(found.path_.budgets)
    for budget in range(1, len(found.path_) + 1):
        subset = found.path_[budget]
        assert len(subset.support) <= budget
        filled = np.bincount(subset.layers, minlength=2)[1:]
        np.testing.assert_array_equal(filled[:-1], sizes[: len(filled) - 1])
        assert_optimal(A, b, subset, 1e-3)
        assert len(filled) == np.searchsorted(np.cumsum(sizes), budget) + 1  # no layer begins before the last is whole


@pytest.mark.parametrize("estimator", [NonNegativeOMP(20, alpha=0.1), MatchingPursuit(20, alpha=0.1)])
def test_of_the_other_pursuits(estimator):
    A, b = low_rank(2)
    A = A * np.random.default_rng(0).uniform(0.5, 2.0, 400)
    found = estimator.fit(A, b)
    np.testing.assert_array_equal(found.path_[20].support, found.support_)
    np.testing.assert_array_equal(found.path_[20].weights, found.coef_[found.support_])
    for budget in (1, 3, 8, 19):
        assert_optimal(A, b, found.path_[budget], 0.1)
    contribution = found.coef_[found.support_] * np.linalg.norm(A[:, found.support_], axis=0)
    largest = set(found.support_[np.argsort(-contribution)[:16]])
    assert set(found.path_[16].support) <= largest
    assert found.path_[16].objective <= found.path_[3].objective


@pytest.mark.parametrize("targets", ["mean", "split"])
def test_pickled_estimators_keep_the_grid(targets):
    A, b = low_rank(3)
    y = np.stack([b, A[:, :3].sum(axis=1)], axis=1)
    found = GradientTrajectoryPursuit(30, targets=targets).fit(A, y)
    found.path_[29]
    stored = pickle.dumps(found)
    assert len(stored) < 50_000  # the matrix has 640,000 bytes
    loaded = pickle.loads(stored)
    again = pickle.loads(pickle.dumps(loaded))
    for path in (loaded.path_, again.path_, pickle.loads(pickle.dumps(found.path_))):
        assert path.budgets == found.path_.budgets
        assert len(path) == len(found.path_)
        for budget, subset in path:
            for name, value in vars(found.path_[budget]).items():
                np.testing.assert_array_equal(getattr(subset, name), value)
        assert path.knee() == found.knee()
        assert path.knee("chord") == found.knee("chord")
        missing = next(j for j in range(1, 30) if j not in path.budgets)
        with pytest.raises(PursuitError, match=f"no subset for a budget of {missing}"):
            path[missing]
        assert len(found.path_[missing].support) <= missing  # pickling took nothing from the original
    np.testing.assert_array_equal(loaded.coef_, found.coef_)
    np.testing.assert_array_equal(loaded.path_.whole().support, loaded.support_)
    np.testing.assert_allclose(loaded.predict(A), found.predict(A))


def test_knees_of_a_curve_with_a_visible_knee():
    # Ten atoms carry nearly everything, thirty hardly anything.
    weights = np.concatenate([np.full(10, 10.0), np.full(30, 0.5)])
    found = GradientTrajectoryPursuit(40, alpha=0.0).fit(np.eye(50)[:, :40], np.append(weights, np.zeros(10)))
    gains = {budget: 1 - 2 * subset.objective / (weights @ weights) for budget, subset in found.path_}
    assert all(
        gain == pytest.approx((weights[:budget] ** 2).sum() / (weights @ weights)) for budget, gain in gains.items()
    )
    gain = found.knee()
    assert gain.rule == "gain"
    assert gain.budget == min(budget for budget, share in gains.items() if share >= 0.95)
    assert 10 <= gain.budget <= 12
    assert gain == found.knee("gain") == found.path_.knee()
    chord = found.knee("chord")
    assert chord.rule == "chord"
    assert chord.budget == max(gains, key=lambda budget: gains[budget] - budget / 40)
    assert 8 <= chord.budget <= 12
    assert chord.relative_residual == found.path_[chord.budget].relative_residual


def test_knee_of_one_atom_and_of_the_first_layer():
    one = GradientTrajectoryPursuit(1).fit(np.eye(3), np.ones(3))
    assert one.knee().budget == one.knee("chord").budget == 1
    layers = GradientTrajectoryPursuit(4, alpha=0.0).fit(fan([30, 10, 50, 70]), np.array([2.0, 0.0]))
    assert layers.knee().budget == 1
    assert layers.knee().relative_residual == pytest.approx(np.sin(np.deg2rad(10)))


def test_stored_features_are_read_for_chosen_atoms_only():
    A, b = low_rank(5)

    class Watched(TrajectoryMatrix):
        asked = frozenset()

        def columns(self, ids):
            self.asked |= frozenset(ids.tolist())
            return super().columns(ids)

    X = Watched([[A.T.astype(np.float16)]])
    found = GradientTrajectoryPursuit(25).fit(X, b)
    X.asked = frozenset()
    list(found.path_)
    found.path_[11]
    assert X.asked
    assert X.asked <= set(found.support_.tolist())


def test_refusals():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(5).fit(A, b)
    for budget in (0, -1, 2.5, True, "3"):
        with pytest.raises(PursuitError, match="the budget is"):
            found.path_[budget]
    with pytest.raises(PursuitError, match="rule is 'gan'; did you mean 'gain'"):
        found.knee("gan")
    nothing = GradientTrajectoryPursuit(2).fit(-np.eye(2), np.ones(2))
    assert len(nothing.path_) == 0
    assert nothing.path_.budgets == []
    assert nothing.path_[2].support.size == 0
    assert pickle.loads(pickle.dumps(nothing)).path_[1].support.size == 0
    with pytest.raises(PursuitError, match="support is empty"):
        nothing.knee()
