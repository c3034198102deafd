"""The conventions of scikit-learn: its own checks, data frames, and arrays that must not be copied."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import (
    DenseMatrix,
    GradientTrajectoryPursuit,
    GradMatch,
    MatchingPursuit,
    NonNegativeOMP,
)
from gradpursuit.pursuit import base as base_module

ESTIMATORS = [GradientTrajectoryPursuit, NonNegativeOMP, GradMatch, MatchingPursuit]
VARIANTS = [
    *(estimator() for estimator in ESTIMATORS),
    GradientTrajectoryPursuit(targets="balanced", saturation="stop", max_coherence=None),
    GradientTrajectoryPursuit(targets="split", tol=1e-3),
]

# The checks that cannot hold, and why. An entry that holds after all fails the test (xfail_strict).
EXPECTED_FAILURES = {
    "check_dtype_object": (
        "arrays of Python objects are refused, numbers among them: whatever they hold would be converted silently"
    ),
    "check_supervised_y_2d": (
        "y [D, q] is q targets, so y [D, 1] is one target and as good as y [D]: there is nothing to warn of"
    ),
}


def data(D=30, N=12):
    rng = np.random.default_rng(0)
    return rng.standard_normal((D, N)) + 0.5, rng.standard_normal(D) + 0.5


@parametrize_with_checks(VARIANTS, expected_failed_checks=lambda estimator: EXPECTED_FAILURES)
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_data_frame_lends_its_names(estimator):
    A, b = data()
    frame = pd.DataFrame(A, columns=[f"example {i}" for i in range(A.shape[1])])
    found = estimator(4).fit(frame, pd.Series(b))
    np.testing.assert_array_equal(found.feature_names_in_, frame.columns)
    np.testing.assert_allclose(found.coef_, estimator(4).fit(A, b).coef_, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(found.predict(frame), A @ found.coef_)
        with pytest.raises(PursuitError, match="names should match"):
            found.predict(frame[frame.columns[::-1]])
    assert not hasattr(found.fit(A, b), "feature_names_in_")


def test_atoms_that_are_added_have_no_names():
    A, b = data()
    frame = pd.DataFrame(A, columns=[f"example {i}" for i in range(A.shape[1])])
    found = GradientTrajectoryPursuit(4).fit(frame, b).extend(A + 1.0)
    assert found.n_features_in_ == len(found.coef_) == 24
    assert not hasattr(found, "feature_names_in_")
    assert found.predict(np.hstack([A, A + 1.0])).shape == b.shape


def test_a_warm_start_wants_the_same_atoms():
    A, b = data()
    frame = pd.DataFrame(A, columns=[f"example {i}" for i in range(A.shape[1])])
    found = GradientTrajectoryPursuit(4, warm_start=True).fit(frame, b)
    with pytest.raises(PursuitError, match="11 columns"):
        found.fit(frame.iloc[:, :11], b)
    assert found.n_features_in_ == 12
    assert found.predict(frame).shape == b.shape
    with pytest.raises(PursuitError, match="names should match"):
        found.fit(frame[frame.columns[::-1]], b)


def as_frame(A):
    return pd.DataFrame(A, copy=False)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy, as_frame])
def test_floats_are_not_copied(estimator, dtype, order, wrap, monkeypatch):
    A, b = data()
    A = np.asarray(A, dtype=dtype, order=order)
    used = []

    def as_matrix(X):
        used.append(DenseMatrix(X))
        return used[-1]

    monkeypatch.setattr(base_module, "as_matrix", as_matrix)
    estimator(3).fit(wrap(A), b)
    assert len(used) == 1
    assert np.shares_memory(used[0]._X, A)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_memory_maps_and_matrices_are_left_alone(estimator, tmp_path):
    A, b = data()
    np.save(tmp_path / "a.npy", A.T)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r").T
    expected = estimator(3).fit(A, b)
    for X in (mapped, DenseMatrix(mapped), torch.from_numpy(A)):
        found = estimator(3).fit(X, b)
        np.testing.assert_array_equal(found.support_, expected.support_)
        np.testing.assert_allclose(found.predict(X), expected.predict(A))
        assert found.n_features_in_ == 12


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("made", ["clone", "pickle", "deepcopy"])
def test_what_is_copied_is_as_good_and_the_original_stays_as_it_was(estimator, made):
    A, b = data(60, 80)
    found = estimator(50, alpha=1e-3).fit(A, b)
    every = [found.path_[j].weights for j in range(1, len(found.support_) + 1)]
    knee = found.knee()
    copied = {"clone": clone, "pickle": lambda e: pickle.loads(pickle.dumps(e)), "deepcopy": copy.deepcopy}[made](found)
    if made == "clone":
        copied.fit(A, b)
    for name, value in found.__dict__.items():
        if isinstance(value, np.ndarray) and name.endswith("_"):
            np.testing.assert_array_equal(getattr(copied, name), value)
    np.testing.assert_array_equal(copied.predict(A), found.predict(A))
    assert copied.knee() == found.knee() == knee
    for budget, subset in copied.path_:
        np.testing.assert_array_equal(subset.support, found.path_[budget].support)
    for j, weights in enumerate(every, 1):
        np.testing.assert_array_equal(found.path_[j].weights, weights)


def test_a_stored_path_says_which_budgets_it_has():
    A, b = data(60, 80)
    found = pickle.loads(pickle.dumps(GradientTrajectoryPursuit(50, alpha=1e-3, saturation="stop").fit(A, b)))
    missing = next(j for j in range(1, len(found.support_)) if j not in found.path_.budgets)
    with pytest.raises(PursuitError, match=f"no subset for a budget of {missing}"):
        found.path_[missing]
    with pytest.raises(PursuitError, match="call fit first"):
        found.extend(A)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (csr_array(np.eye(3)), np.ones(3), "sparse matrix.*toarray"),
        (np.eye(3), csr_array(np.ones((3, 1))), "sparse matrix.*toarray"),
        (np.eye(3) * 1j, np.ones(3), "Complex data not supported"),
        (torch.eye(3) * 1j, np.ones(3), "Complex data not supported"),
        (np.eye(3).astype(object), np.ones(3), "type object"),
        (np.array([["1", "2"], ["3", "4"]]), np.ones(2), "not real numbers"),
        (np.ones(3), np.ones(3), r"shape \(3,\).*Reshape"),
        (np.ones((0, 3)), np.ones(0), r"shape \(0, 3\)"),
        (np.ones((3, 0)), np.ones(3), r"0 feature\(s\) \(shape=\(3, 0\)\)"),
        (np.eye(3), None, "requires y to be passed"),
        (np.eye(3), np.ones(3) * 1j, "Complex data not supported"),
        (np.eye(3), ["a", "b", "c"], "not real numbers"),
    ],
)
def test_refused_data(estimator, X, y, message):
    with pytest.raises(PursuitError, match=message):
        estimator(1).fit(X, y)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (NonNegativeOMP(1, tol=None), "tol is None"),
        (GradMatch(1, tol=None), "tol is None"),
        (MatchingPursuit(1, tol=None), "tol is None"),
        (MatchingPursuit(1, max_iter=0), "max_iter is 0"),
        (MatchingPursuit(1, max_iter=2.5), "max_iter is 2.5"),
        (NonNegativeOMP(1, alpha="a"), "alpha is 'a'"),
        (GradientTrajectoryPursuit(1, max_coherence="a"), "max_coherence is 'a'"),
    ],
)
def test_refused_parameters(made, message):
    with pytest.raises(PursuitError, match=message):
        made.fit(np.eye(3), np.ones(3))
