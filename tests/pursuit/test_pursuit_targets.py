"""Several targets at once: their mean, all of them with one support, or each on its own."""

import numpy as np
import pytest
from scipy.optimize import nnls as scipy_nnls
from test_pursuit_gtp import low_rank

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import GradientTrajectoryPursuit, GradMatch, MatchingPursuit, NonNegativeOMP


def best_residual(A, b, alpha):
    """‖b − A w‖/‖b‖ for SciPy's best w >= 0 with the ridge `alpha` times 1 (of unit columns)."""
    x, _ = scipy_nnls(np.vstack([A, np.sqrt(alpha) * np.eye(A.shape[1])]), np.append(b, np.zeros(A.shape[1])))
    return np.linalg.norm(A @ x - b) / np.linalg.norm(b), x


def several(seed, q=3):
    A, _ = low_rank(seed)
    rng = np.random.default_rng(100 + seed)
    lengths = 10.0 ** np.arange(q)
    y = np.stack([A[:, rng.choice(400, 15, replace=False)].mean(1) for _ in range(q)], axis=1)
    return A, y * lengths / np.linalg.norm(y, axis=0)


@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_orthogonal_targets_by_hand(targets):
    # Each target is one atom; the last atom serves neither.
    y = np.array([[4.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    found = GradientTrajectoryPursuit(2, alpha=0.0, targets=targets).fit(np.eye(3), y)
    np.testing.assert_array_equal(found.support_, [0, 1])
    np.testing.assert_allclose(found.coef_, [2.0, 1.0, 0.0], atol=1e-12)  # the mean of the weights for each target
    np.testing.assert_allclose(found.group_residuals_, [0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.predict(np.eye(3)), y.mean(axis=1), atol=1e-12)


def test_balanced_serves_a_small_target_that_the_mean_neglects():
    a, b, c = np.eye(3)
    A = np.stack([a, (a + 0.1 * b) / np.sqrt(1.01), c], axis=1)
    y = np.stack([10 * a + b, 0.01 * c], axis=1)  # the second is short
    mean = GradientTrajectoryPursuit(2, alpha=0.0, saturation="stop").fit(A, y)
    balanced = GradientTrajectoryPursuit(2, alpha=0.0, saturation="stop", targets="balanced").fit(A, y)
    assert 2 in balanced.support_
    np.testing.assert_allclose(balanced.group_residuals_, 0.0, atol=1e-9)
    short = GradientTrajectoryPursuit(1, alpha=0.0, saturation="stop").fit(A, y)
    np.testing.assert_array_equal(short.support_, [1])
    np.testing.assert_allclose(short.group_residuals_, [0.0, 1.0], atol=1e-9)
    assert mean.group_residuals_[0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_is_fairer_than_the_mean(seed):
    A, y = several(seed)
    fitted = {t: GradientTrajectoryPursuit(24, targets=t).fit(A, y) for t in ("mean", "balanced", "split")}
    worst = {t: found.group_residuals_.max() for t, found in fitted.items()}
    assert worst["balanced"] < 0.9 * worst["mean"]
    assert worst["split"] < 0.9 * worst["mean"]
    assert fitted["mean"].group_residuals_[0] > 0.9 * worst["mean"]  # the shortest


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_group_residuals_are_those_of_the_best_weights(targets, alpha):
    A, y = several(1)
    found = GradientTrajectoryPursuit(20, alpha=alpha, targets=targets, saturation="stop").fit(A, y)
    expected = [best_residual(A[:, found.support_], b, alpha)[0] for b in y.T]
    np.testing.assert_allclose(found.group_residuals_, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_balanced_weights_and_objective(alpha):
    A, y = several(2)
    found = GradientTrajectoryPursuit(20, alpha=alpha, targets="balanced", saturation="stop").fit(A, y)
    S, units = found.support_, y / np.linalg.norm(y, axis=0)
    solved = [best_residual(A[:, S], b, alpha) for b in units.T]
    weights = np.mean([x * np.linalg.norm(b) for (_, x), b in zip(solved, y.T, strict=True)], axis=0)
    np.testing.assert_allclose(found.coef_[S], weights, rtol=1e-7, atol=1e-12)
    assert found.residual_path_[-1] == pytest.approx(np.sqrt(np.mean([r**2 for r, _ in solved])))
    assert found.objective_path_[-1] == pytest.approx(np.mean([r**2 + alpha * x @ x for r, x in solved]) / 2)
    assert (np.diff(found.objective_path_) < 0).all()
    assert found.kkt_ <= 1e-8


def test_the_length_of_one_target_does_not_matter_to_balanced():
    A, y = several(0)
    found = GradientTrajectoryPursuit(20, targets="balanced").fit(A, y)
    scaled = GradientTrajectoryPursuit(20, targets="balanced").fit(A, y * [1e3, 1.0, 1e-5])
    np.testing.assert_array_equal(scaled.support_, found.support_)
    np.testing.assert_allclose(scaled.group_residuals_, found.group_residuals_, rtol=1e-9)
    np.testing.assert_allclose(scaled.residual_path_, found.residual_path_, rtol=1e-9)


def test_the_mean_is_the_mean():
    A, y = several(3)
    found = GradientTrajectoryPursuit(20).fit(A, y)
    alone = GradientTrajectoryPursuit(20).fit(A, y.mean(axis=1))
    np.testing.assert_array_equal(found.coef_, alone.coef_)
    assert not hasattr(alone, "group_residuals_")
    for estimator in (NonNegativeOMP(5), GradMatch(5), MatchingPursuit(5)):
        several_, one = estimator.fit(A, y).coef_, estimator.fit(A, y.mean(axis=1)).coef_
        np.testing.assert_array_equal(several_, one)


@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_one_target_as_a_column_is_one_target(targets):
    A, b = low_rank(4)
    found = GradientTrajectoryPursuit(20, targets=targets).fit(A, b[:, None])
    alone = GradientTrajectoryPursuit(20).fit(A, b)
    np.testing.assert_array_equal(found.support_, alone.support_)
    np.testing.assert_allclose(found.coef_, alone.coef_, rtol=1e-12)
    assert found.group_residuals_.shape == (1,)


def test_split_is_each_on_its_own():
    A, y = several(0)
    found = GradientTrajectoryPursuit(20, targets="split", max_coherence=None).fit(A, y)
    alone = [GradientTrajectoryPursuit(k, max_coherence=None).fit(A, b) for k, b in zip((7, 7, 6), y.T, strict=True)]
    assert set(found.support_) == set(np.concatenate([part.support_ for part in alone]))
    np.testing.assert_allclose(found.coef_, np.mean([part.coef_ for part in alone], axis=0), rtol=1e-12)
    assert found.stop_reason_ == [reason for part in alone for reason in part.stop_reason_]
    assert found.n_iter_ == sum(part.n_iter_ for part in alone)
    contributions = found.coef_[found.support_] * np.linalg.norm(A[:, found.support_], axis=0)
    assert (np.diff(contributions) <= 0).all()


def test_split_of_equal_targets_is_a_smaller_union():
    A, b = low_rank(0)
    found = GradientTrajectoryPursuit(20, targets="split").fit(A, np.stack([b, 2 * b], axis=1))
    assert len(found.support_) == 10


def test_split_knows_the_copies_of_the_targets_before():
    rng = np.random.default_rng(0)
    A, _ = low_rank(0, N=60)
    A = np.concatenate([A, A * rng.uniform(0.5, 2.0, 60)], axis=1)
    y = np.stack([A[:, :20].mean(1), A[:, 10:40].mean(1), A[:, 30:60].mean(1)], axis=1)
    found = GradientTrajectoryPursuit(45, targets="split").fit(A, y)
    assert len(set(found.support_ % 60)) == len(found.support_)
    assert found.copies_
    assert not set(found.copies_) & set(found.support_)
    found.extend(A[:, :30] * 3)
    assert not set(found.copies_) & set(found.support_)
    assert all(copy % 60 == original % 60 for copy, original in found.copies_.items())


@pytest.mark.parametrize("targets", ["mean", "balanced", "split"])
def test_path_of_several_targets(targets):
    A, y = several(1)
    found = GradientTrajectoryPursuit(31, targets=targets).fit(A, y)
    for budget, subset in found.path_:
        assert 0 < len(subset.support) <= budget
        assert (subset.weights > 0).all()
    np.testing.assert_array_equal(found.path_[len(found.path_)].support, found.support_)
    np.testing.assert_array_equal(found.path_[31].weights, found.coef_[found.support_])
    assert (np.diff([subset.objective for _, subset in found.path_]) <= 1e-12).all()
    gains = {budget: (found.path_[31].objective, subset.objective) for budget, subset in found.path_}
    knee = found.knee()
    nothing = 0.5 * np.sum(y**2) / 3 if targets == "split" else 0.5 * np.sum(y.mean(axis=1) ** 2)
    nothing = 0.5 if targets == "balanced" else nothing
    assert knee.budget == min(j for j, (least, here) in gains.items() if nothing - here >= 0.95 * (nothing - least))
    assert 1 <= found.knee("chord").budget < 31


def test_path_of_targets_of_uneven_size():
    # The first target is matched by one atom, the second needs five.
    A = np.eye(10)
    y = np.stack([A[0], A[:, 1:6] @ np.arange(5.0, 0.0, -1.0)], axis=1)
    found = GradientTrajectoryPursuit(10, alpha=0.0, targets="split", saturation="stop").fit(A, y)
    assert len(found.path_) == 6
    sets = [set(found.path_[budget].support) for budget in range(1, 7)]
    assert sets == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, set(range(6))]
    np.testing.assert_allclose(found.path_[1].weights, [0.5])  # the mean over targets, served or not
    assert found.path_[1].relative_residual == pytest.approx(np.sqrt(0.5))
    np.testing.assert_array_equal(found.path_[10].support, found.support_)


def test_atoms_of_nothing_have_group_residuals():
    found = GradientTrajectoryPursuit(2).fit(-np.eye(3), np.ones((3, 2)))
    assert found.support_.size == 0
    np.testing.assert_allclose(found.group_residuals_, [1.0, 1.0])


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({"targets": "all"}, np.ones((3, 2)), "targets is 'all'"),
        ({"targets": "mean"}, np.array([[1.0, 0.0]] * 3), "target group 1 is zero"),
        ({"targets": "balanced"}, np.array([[0.0, 1.0]] * 3), "target group 0 is zero"),
        ({"targets": "split"}, np.array([[1.0, 0.0]] * 3), "target group 1 is zero"),
        ({"targets": "mean"}, np.array([[1.0, -1.0]] * 3), "the target gradient is zero"),
        ({"targets": "split"}, np.ones((3, 3)), "n_nonzero_coefs is 2, but 3 targets share it"),
        (
            {"targets": "split"},
            np.array([[1.0, np.inf]] * 3),
            "3 entries that are not finite, the first inf at index 0, 1",
        ),
    ],
)
def test_refusals(options, y, message):
    with pytest.raises(PursuitError, match=message):
        GradientTrajectoryPursuit(2, **options).fit(np.eye(3), y)


def test_steps_of_a_split_go_on_in_seconds_and_bytes():
    A, y = several(0)
    found = GradientTrajectoryPursuit(24, targets="split").fit(A, y)
    seconds, read = ([getattr(step, name) for step in found.steps_] for name in ("seconds", "bytes_read"))
    assert sum(step.iteration == 0 and step.layer == 1 for step in found.steps_) == y.shape[1]
    assert (np.diff(seconds) >= 0).all()
    assert (np.diff(read) >= 0).all()
    assert read[0] == A.nbytes  # for the norms, once
    assert read[-1] >= found.n_iter_ * A.nbytes


@pytest.mark.parametrize("estimator", [GradientTrajectoryPursuit, NonNegativeOMP])
def test_the_score_for_several_targets_is_that_for_their_mean(estimator):
    A, y = several(0)
    found = estimator(10).fit(A, y)
    assert 0 < found.score(A, y) < 1
    assert found.score(A, y) == pytest.approx(found.score(A, y.mean(axis=1)))


def test_residuals_of_groups_are_those_of_the_last_fit():
    rng = np.random.default_rng(5)
    X = rng.standard_normal((30, 40))
    pursuit = GradientTrajectoryPursuit(5, targets="balanced").fit(X, X[:, :2])
    assert pursuit.group_residuals_.shape == (2,)
    assert not hasattr(pursuit.fit(X, X[:, 0]), "group_residuals_")
