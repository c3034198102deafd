"""Edge cases, each with its stated outcome, for every pursuit and both ways of refitting."""

import numpy as np
import pytest

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import GradientTrajectoryPursuit, GradMatch, MatchingPursuit, NonNegativeOMP
from gradpursuit.pursuit import problem as problem_module

ESTIMATORS = [GradientTrajectoryPursuit, NonNegativeOMP, GradMatch, MatchingPursuit]


@pytest.fixture(params=["gram", "columns"], autouse=True)
def way(request, monkeypatch):
    if request.param == "columns":
        monkeypatch.setattr(problem_module, "GRAM_COLUMNS", 0)


@pytest.fixture(params=ESTIMATORS)
def pursue(request):
    """Fit the pursuit with budget k, without a ridge."""
    return lambda A, b, k, **options: request.param(k, alpha=0.0, **options).fit(A, b)


def data(D=12, N=20):
    rng = np.random.default_rng(0)
    return rng.standard_normal((D, N)) + 0.3, np.abs(rng.standard_normal(D)) + 0.3


def residual(A, b, found):
    first = np.where(np.isin(np.arange(A.shape[1]), found.support_[found.layers_ == 1]), found.coef_, 0.0)
    return np.linalg.norm(A @ first - b) / np.linalg.norm(b)


def test_ties_go_to_the_lower_id(pursue):
    found = pursue(np.eye(4), np.ones(4), 2)
    np.testing.assert_array_equal(found.support_, [0, 1])
    np.testing.assert_allclose(found.coef_, [1, 1, 0, 0], atol=1e-12)


def test_zero_columns_are_never_chosen(pursue):
    A, b = data()
    A[:, ::2] = 0.0
    found = pursue(A, b, 20)
    assert len(found.support_) > 1
    assert (found.support_ % 2 == 1).all()
    empty = pursue(np.zeros((3, 4)), np.ones(3), 2)
    assert empty.support_.shape == (0,)
    assert empty.stop_reason_ == ["no positive correlation"]


def test_atoms_too_short_to_have_a_length_are_zero_columns(pursue):
    A, b = data()
    assert pursue(1e-200 * A, b, 3).support_.shape == (0,)


def test_duplicate_columns_give_one_solution(pursue):
    A, b = data(N=8)
    once, found = pursue(A, b, 8), pursue(np.tile(A, 2), b, 8)
    assert residual(np.tile(A, 2), b, found) == pytest.approx(residual(A, b, once), abs=2e-3)
    groups = found.support_[found.layers_ == 1] % 8
    assert len(set(groups)) == len(groups)


def test_a_budget_of_one(pursue):
    A, b = data()
    A /= np.linalg.norm(A, axis=0)
    found = pursue(A, b, 1)
    best = int(np.argmax(A.T @ b))
    np.testing.assert_array_equal(found.support_, [best])
    assert found.coef_[best] == pytest.approx(A[:, best] @ b)


@pytest.mark.parametrize("D", [12, 2])
def test_a_budget_of_all_atoms_and_above_the_rank(pursue, D):
    A, b = data(D)
    found = pursue(A, b, 20)
    assert 1 <= len(found.support_) == len(set(found.support_)) <= 20
    assert (found.coef_[found.support_] > 0).all()
    assert residual(A, b, found) <= (1e-6 if D == 2 else 0.5)


def test_a_target_of_zero_is_an_error(pursue):
    with pytest.raises(PursuitError, match="target gradient is zero"):
        pursue(np.eye(3), np.zeros(3), 1)


def test_no_positive_correlation_is_an_empty_support(pursue):
    A, b = data()
    found = pursue(-np.abs(A), b, 3)
    assert found.support_.shape == found.layers_.shape == (0,)
    assert not found.coef_.any()
    assert found.kkt_ == 0.0
    assert len(found.path_) == 0
    assert found.stop_reason_ == ["no positive correlation"]
    np.testing.assert_allclose(found.residual_path_, [1.0])
    with pytest.raises(PursuitError, match="support is empty"):
        found.knee()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_is_an_error_that_says_where(pursue, value, dtype):
    A, b = (part.astype(dtype) for part in data())
    bad, worse = A.copy(), b.copy()
    bad[1, 5], worse[4] = value, value
    with pytest.raises(PursuitError, match="first is atom 5"):
        pursue(bad, b, 3)
    with pytest.raises(PursuitError, match="at index 4"):
        pursue(A, worse, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, bool])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_layouts_give_the_same_support(pursue, dtype, order):
    A, b = data()
    A = np.asarray(A > 0.3 if dtype in (bool, np.uint8) else np.round(8 * A), dtype=dtype, order=order)
    b = np.round(8 * b).astype(np.uint8 if dtype is bool else dtype)
    found, expected = pursue(A, b, 5), pursue(A.astype(np.float64), b.astype(np.float64), 5)
    np.testing.assert_array_equal(found.support_, expected.support_)
    np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-4)
    assert found.coef_.dtype == np.float64


def test_one_atom_and_one_row(pursue):
    b = np.array([1.0, 2.0])
    found = pursue(np.array([[2.0], [4.0]]), b, 1)
    np.testing.assert_array_equal(found.support_, [0])
    assert found.coef_[0] == pytest.approx(0.5)
    assert pursue(np.array([[-2.0], [-4.0]]), b, 1).support_.shape == (0,)
    row = pursue(np.array([[1.0, 2.0, -1.0, 0.0]]), np.array([3.0]), 4)
    assert set(row.support_) <= {0, 1}
    assert residual(np.array([[1.0, 2.0, -1.0, 0.0]]), np.array([3.0]), row) <= 1e-7
    one = pursue(np.array([[2.0]]), np.array([3.0]), 1)
    assert one.coef_[0] == pytest.approx(1.5)
    assert one.stop_reason_ == ["target matched"]
