"""Features projected onto the directions of the target or of the pool."""

from __future__ import annotations

import numpy as np
import pytest

from gradpursuit.config import PursuitSection
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.selection import SelectionProblem, strategy
from gradpursuit.selection.subspace import SAMPLE, projected, subspace
from problems import problem, trajectory

T, N, M, D = 2, 40, 6, 20


def given(**pursuit: object) -> SelectionProblem:
    rng = np.random.default_rng(0)
    pool, target = rng.standard_normal((T, N, D)), rng.standard_normal((T, M, D))
    features = {"adam-symmetric": trajectory(*pool)}, {"adam-symmetric": trajectory(*target)}
    return problem(*features, groups=[0, 0, 0, 1, 1, 1], rates=[2, 1], pursuit=pursuit)


@pytest.mark.parametrize("rank", [3, 6, 12])
def test_bases_are_the_right_singular_vectors(rank: int) -> None:
    target = given().target["adam-symmetric"]
    for t, basis in enumerate(subspace(target, rank)):
        _, _, V = np.linalg.svd(target.at(t), full_matrices=False)
        kept = min(rank, M)
        assert basis.shape == (D, kept)
        np.testing.assert_allclose(basis.T @ basis, np.eye(kept), atol=1e-10)
        np.testing.assert_allclose(np.abs(np.sum(basis * V[:kept].T, axis=0)), 1, rtol=1e-8)


def test_directions_that_are_rounding_are_left_out() -> None:
    rows = np.outer([1.0, 2, 3], [3.0, 4, 0]) + np.outer([1.0, -2, 1], [0, 0, 1e-9])
    (basis,) = subspace(TrajectoryFeatures([[rows]]), 3)
    np.testing.assert_allclose(np.abs(basis[:, 0]), [0.6, 0.8, 0], atol=1e-7)
    assert basis.shape == (3, 1)


def test_many_rows_are_sampled_at_equal_distances() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3 * SAMPLE, 5)) * [5, 4, 3, 2, 1]
    (basis,) = subspace(TrajectoryFeatures([[rows]]), 2)
    assert np.abs(basis[0, 0]) > 0.99
    assert np.abs(basis[1, 1]) > 0.99


@pytest.mark.parametrize("source", ["target", "pool"])
def test_the_problem_is_that_of_the_projected_features(source: str) -> None:
    plain = given()
    both = plain.pool["adam-symmetric"], plain.target["adam-symmetric"]
    bases = subspace(both[1] if source == "target" else both[0], 4)
    U, G = (projected(features, bases) for features in both)
    for t in range(T):
        np.testing.assert_allclose(U.at(t), both[0].at(t) @ bases[t], rtol=1e-4, atol=1e-4)
    A, b = given(subspace=source, rank=4).matching()
    goal = np.stack([(G.at(t)[:3].mean(axis=0) + G.at(t)[3:].mean(axis=0)) / 2 for t in range(T)])
    shares = np.sqrt([2, 1]) / np.linalg.norm(goal, axis=1)
    rows = [shares[t] * U.at(t) / np.linalg.norm(U.at(t), axis=1, keepdims=True) for t in range(T)]
    assert A.shape == (T * 4, N)
    np.testing.assert_allclose(A.columns(np.arange(N)), np.concatenate(rows, axis=1).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b, np.concatenate([shares[t] * goal[t] for t in range(T)]), rtol=1e-5)
    A, _ = given(subspace=source, rank=4, normalize="unit-before").matching()
    rows = [shares[t] * U.at(t) / np.linalg.norm(both[0].at(t), axis=1, keepdims=True) for t in range(T)]
    np.testing.assert_allclose(A.columns(np.arange(N)), np.concatenate(rows, axis=1).T, rtol=1e-4, atol=1e-5)


def test_a_full_subspace_changes_nothing() -> None:
    for source in ("none", "pool"):
        found = strategy("gtp").select(given(subspace=source, rank=D), 5, 0)
        expected = strategy("gtp").select(given(), 5, 0)
        assert found.indices.tolist() == expected.indices.tolist()
        np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4)
    narrow = strategy("gtp").select(given(subspace="target", rank=2), 5, 0)
    assert narrow.indices.tolist() != expected.indices.tolist()


def test_rows_outside_the_subspace_are_never_chosen() -> None:
    pool = trajectory([[1, 0, 0], [0, 0, 1], [1, 1, 0]])
    here = problem({"adam-symmetric": pool}, {"adam-symmetric": trajectory([[1, 2, 0], [2, 1, 0]])})
    settings = PursuitSection(subspace="target", rank=2)
    matrix, _ = here.matching(settings=settings)
    np.testing.assert_allclose(matrix.squared_norms()[1], 0)
    assert 1 not in strategy("gtp", {"gtp": {"subspace": "target", "rank": 2}}).select(here, 3, 0).indices


def test_options_of_one_strategy_leave_the_others_alone() -> None:
    options = {"gtp": {"subspace": "target", "rank": 2}}
    section = given(subspace="target", rank=2)
    for name in ("gtp", "omp", "topk", "gradmatch"):
        by_section = strategy(name).select(section, 4, 0).indices.tolist()
        by_option = strategy(name, {name: options["gtp"]}).select(given(), 4, 0).indices.tolist()
        assert by_option == by_section
        assert strategy(name, options if name != "gtp" else {}).select(given(), 4, 0).indices.tolist() != by_section
