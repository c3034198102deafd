"""A matrix on workers gives what one machine gives, whoever owns what, and counts what it moves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodes import Cluster
from pools import Pool, same

from gradpursuit.cluster import ClusterFeatures, RayGradientMatrix, parts_of
from gradpursuit.cluster.session import Session
from gradpursuit.cluster.team import Team, shares
from gradpursuit.config import EngineSection
from gradpursuit.errors import PursuitError, StoreError
from gradpursuit.pursuit import GradientMatrix, GradientTrajectoryPursuit, JoinedMatrix, MatchingPursuit, NonNegativeOMP
from gradpursuit.pursuit.ranking import RankedMatrix

WORKERS = 8


@pytest.fixture(scope="module")
def team(cluster: Cluster) -> Iterator[Team]:
    made = Team.begin(Session(EngineSection(name="ray")), WORKERS)
    yield made
    assert made.lost == 0
    made.close()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(tmp_path_factory.mktemp("pool"))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_support_and_weights_are_those_of_one_machine(team: Team, pool: Pool, workers: int) -> None:
    matrix = pool.on(team, shares([len(part.rows) for part in pool.parts()], workers))
    assert matrix.workers == workers
    expected = pool.pursue(pool.matrix())
    assert len(np.unique(expected.layers_)) >= 1
    same(pool.pursue(matrix), expected)


@pytest.mark.parametrize(("shard_rows", "dtype"), [(1, "float16"), (9, "int8"), (100, "float16"), (240, "float16")])
def test_any_sharding_gives_the_same(team: Team, tmp_path: Path, shard_rows: int, dtype: str) -> None:
    pool = Pool(tmp_path, shard_rows, dtype)
    rng = np.random.default_rng(shard_rows)
    owners = rng.integers(2 if dtype == "int8" else WORKERS, size=len(pool.parts())).tolist()
    matrix, one = pool.on(team, owners), pool.matrix()
    for settings in ({}, {"max_coherence": 0.999, "alpha": 0.01}):
        same(pool.pursue(matrix, **settings), pool.pursue(one, **settings))


def test_ties_are_broken_by_id_wherever_they_lie(team: Team, pool: Pool) -> None:
    matrix = pool.on(team, [number % WORKERS for number in range(len(pool.parts()))])
    assert isinstance(matrix, RankedMatrix)
    r = pool.matrix().columns(np.array([99])).ravel()  # row 100, of which 101 and 102 are copies
    ids, scores = matrix.ranking(r, 1e-6).without(np.array([100])).next(3)
    assert ids.tolist()[:2] == [99, 101]
    assert scores[0] == scores[1] > scores[2]


def test_a_ranking_goes_on_where_it_stopped_without_another_pass(team: Team, pool: Pool) -> None:
    matrix, excluded = pool.on(team), np.array([3, 200, 17])
    scores = pool.matrix().correlate(pool.target)
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] > 0 and i not in excluded.tolist()]
    ranking = matrix.ranking(pool.target, 1e-6)
    atoms = ranking.without(excluded)
    found = [atoms.next(count)[0] for count in (1, 7, 2, 30, 1000, 5)]
    assert np.concatenate(found).tolist() == order
    assert ranking.without(np.concatenate([excluded, order[:3]])).next(9)[0].tolist() == order[3:12]
    assert ranking.without(excluded).next(9)[0].tolist() == order[:9]
    assert len(matrix.traffic.passes) == 1
    assert matrix.traffic.passes[0].residual_bytes == 8 * 60 * matrix.workers


def test_every_answer_is_that_of_one_machine(team: Team, pool: Pool) -> None:
    one, matrix = pool.matrix(), pool.on(team, shares([len(part.rows) for part in pool.parts()], 3))
    assert isinstance(matrix, GradientMatrix)
    assert (matrix.shape, matrix.nbytes) == (one.shape, 239 * 2 * 30 * 2)
    ids = np.random.default_rng(0).permutation(239)[:50]
    several = np.random.default_rng(1).standard_normal((60, 3))
    np.testing.assert_array_equal(matrix.squared_norms(), one.squared_norms())
    np.testing.assert_array_equal(matrix.correlate(pool.target), one.correlate(pool.target))
    np.testing.assert_array_equal(matrix.correlate(several), one.correlate(several))
    np.testing.assert_array_equal(matrix.columns(ids), one.columns(ids))
    assert matrix.columns(ids[:0]).shape == (60, 0)
    weights = np.random.default_rng(2).random(50)
    np.testing.assert_allclose(matrix.combine(ids, weights), one.combine(ids, weights), rtol=1e-12, atol=1e-14)
    with pytest.raises(PursuitError, match=r"column ids run from 239 to 239"):
        matrix.columns(np.array([239]))


def test_several_targets_and_other_solvers(team: Team, pool: Pool) -> None:
    one, matrix = pool.matrix(), pool.on(team)
    several = np.stack([pool.target, np.roll(pool.target, 3)], axis=1)
    for solver in (NonNegativeOMP(9), MatchingPursuit(9)):
        expected = type(solver)(9).fit(one, pool.target)
        found = solver.fit(matrix, pool.target)
        np.testing.assert_array_equal(found.support_, expected.support_)
        np.testing.assert_allclose(found.coef_, expected.coef_, rtol=0, atol=1e-12)
    expected = pool.pursue(one, targets="balanced")
    pool.target, kept = several, pool.target
    try:
        same(pool.pursue(matrix, targets="balanced"), pool.pursue(one, targets="balanced"))
    finally:
        pool.target = kept
    grown = pool.pursue(matrix).extend(one.columns(np.arange(5)))
    assert isinstance(grown._parts[0].problem.matrix, JoinedMatrix)


def test_norms_and_products_at_one_checkpoint(team: Team, pool: Pool) -> None:
    from gradpursuit.features import TrajectoryFeatures

    one, features = TrajectoryFeatures(pool.store.features()).take(pool.rows), ClusterFeatures(team, pool.parts())
    assert (len(features), features.checkpoints) == (239, 2)
    np.testing.assert_array_equal(features.norms(), one.norms())
    direction = np.random.default_rng(0).standard_normal((30, 2))
    np.testing.assert_array_equal(features.dot(1, direction), one.dot(1, direction))


def test_traffic_is_a_residual_out_and_pairs_and_columns_back(team: Team, pool: Pool) -> None:
    matrix = pool.on(team)
    solver = pool.pursue(matrix)
    traffic, k, D = matrix.traffic, 24, 60
    assert matrix.workers == WORKERS
    assert len(traffic.passes) == solver.n_iter_
    for one in traffic.passes:
        assert one.residual_bytes == 8 * D * WORKERS
        assert 0 < one.pairs <= 2 * k * WORKERS
        assert one.columns <= one.pairs
        assert one.excluded_bytes % 8 == 0
    columns = sum(one.columns for one in traffic.passes)
    assert traffic.column_bytes == 4 * D * columns
    told = traffic.describe()
    assert told["bytes_back"] == 16 * sum(one.pairs for one in traffic.passes) + traffic.column_bytes
    assert told["other_bytes"] == 8 * 239 + 2 * 8 * 239  # the norms, and the factors of two checkpoints
    assert told["passes"][0] == {
        "residual_bytes": 3840,
        "excluded_bytes": 0,
        "pairs": traffic.passes[0].pairs,
        "columns": 6,
    }


def opened_by(team: Team, matrix: RayGradientMatrix) -> list[list[int]]:
    """The numbers of the parts that each worker holds open."""
    import ray

    name = matrix._owned.pool

    def opened(worker: Any) -> list[int]:
        return sorted(number for pool, number in worker._opened if pool == name)

    return ray.get([member.actor.__ray_call__.remote(opened) for member in team.members])  # type: ignore[no-any-return]


def test_a_worker_opens_its_own_shards_alone_and_forgets_what_nobody_looks_at(team: Team, pool: Pool) -> None:
    import ray

    def views(worker: Any) -> int:
        return len(worker._views)

    owners = [number % 3 for number in range(len(pool.parts()))]
    matrix = pool.on(team, owners)
    pool.pursue(matrix)
    assert opened_by(team, matrix) == [
        [number for number, owner in enumerate(owners) if owner == place] for place in range(WORKERS)
    ]
    before = ray.get(team.members[0].actor.__ray_call__.remote(views))
    del matrix
    gc.collect()
    assert ray.get(team.members[0].actor.__ray_call__.remote(views)) < before


def test_two_levels_pursue_what_each_part_chooses_alone(team: Team, pool: Pool) -> None:
    matrix, one, settings = pool.on(team), pool.matrix(), {"alpha": 0.3}
    given = np.repeat(shares([len(part.rows) for part in pool.parts()], 3), [len(part.rows) for part in pool.parts()])
    squares, expected = one.squared_norms(), []
    for group in range(3):
        ids = np.flatnonzero(given == group)
        alpha = 0.3 * squares.mean() / squares[ids].mean()
        alone = GradientTrajectoryPursuit(16, alpha=alpha).fit(one.columns(ids), pool.target)
        expected += ids[alone.support_].tolist()
    found = matrix.winners(pool.target, 16, 3, settings)
    assert found.tolist() == sorted(expected)
    (moved,) = matrix.traffic.passes
    assert (moved.residual_bytes, moved.pairs) == (3 * 8 * 60, 0)
    assert sorted(number for opened in opened_by(team, matrix) for number in opened) == list(range(len(pool.parts())))
    exact = pool.pursue(one)
    near = GradientTrajectoryPursuit(24, max_coherence=None).fit(matrix.columns(found), pool.target)
    assert near.residual_path_[-1] <= 1.25 * exact.residual_path_[-1]
    same(pool.pursue(matrix), exact)  # shards that moved for it still answer


def test_rows_that_a_shard_does_not_hold_are_no_other_rows(tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    pool.store.exclude({30: "overflow"})
    every, kept = (parts_of(pool.store.shards, rows) for rows in (np.arange(240), pool.store.kept()))
    assert len(kept[1].open()) == 22
    with pytest.raises(StoreError, match=r"1 rows that are asked for are not there \(first: \[30\]\)") as error:
        every[1].open()
    assert str(pool.store.path(0, 1)) in str(error.value)


def test_an_unreadable_shard_is_named(team: Team, tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    path = pool.store.path(1, 4)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="do not match their checksum") as error:
        pool.on(team).squared_norms()
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(StoreError, match="not there") as error:
        pool.pursue(pool.on(team))
    assert str(path) in str(error.value)
