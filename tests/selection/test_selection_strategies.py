from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradpursuit.config import GradientsSection, PursuitSection
from gradpursuit.errors import ConfigError, SelectionError
from gradpursuit.features import TrajectoryFeatures, pursuit_problem
from gradpursuit.selection import STRATEGIES, SelectionProblem, derive_seed, strategy
from gradpursuit.selection.less import LESS
from gradpursuit.store import DTYPES
from gradpursuit.store.encoding import encode

T, N, M, D = 3, 40, 6, 24


def features(rng: np.random.Generator, rows: int) -> TrajectoryFeatures:
    """Random features in two shards per checkpoint, with checkpoints of very different size."""
    blocks = [(10.0**-t) * rng.standard_normal((rows, D)).astype(np.float32) for t in range(T)]
    return TrajectoryFeatures([[block[: rows // 3], block[rows // 3 :]] for block in blocks])


def problem(seed: int = 0, **pursuit: object) -> SelectionProblem:
    rng = np.random.default_rng(seed)
    labels = ("adam-symmetric", "adam-uncorrected")
    return SelectionProblem(
        ids=[f"row-{i}" for i in range(N)],
        pool={name: features(rng, N) for name in labels},
        target={name: features(rng, M) for name in ("adam-symmetric", "identity")},
        groups=np.array([0, 0, 0, 0, 1, 1]),
        rates=np.array([3e-4, 2e-4, 1e-4]),
        gradients=GradientsSection(),
        pursuit=PursuitSection(**pursuit),
    )


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("balance", [True, False])
def test_stacking_is_the_written_formula(unit: bool, balance: bool) -> None:
    rng = np.random.default_rng(1)
    pool, target = features(rng, N), features(rng, M)
    rates = np.array([3e-4, 2e-4, 1e-4])
    g = target.group_mean(np.array([0, 0, 0, 0, 1, 1]))
    matrix, b = pursuit_problem(pool, g, rates, norms=pool.norms() if unit else None, balance=balance)
    expected_rows, expected_b = [], []
    for t in range(T):
        rows = np.concatenate(pool.blocks[t]).astype(np.float64)
        goal = np.concatenate(target.blocks[t]).astype(np.float64)
        mean = (goal[:4].mean(axis=0) + goal[4:].mean(axis=0)) / 2
        np.testing.assert_allclose(g[t], mean, rtol=1e-6)
        if unit:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        share = np.sqrt(rates[t]) / (np.linalg.norm(mean) if balance else 1)
        expected_rows.append(share * rows)
        expected_b.append(share * mean)
    A = np.concatenate(expected_rows, axis=1).T
    assert matrix.shape == A.shape
    np.testing.assert_allclose(matrix.columns(np.arange(N)), A, rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(b, np.concatenate(expected_b), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_store_are_read_with_their_scales(dtype: str) -> None:
    """Every reading of stored features is that of the decoded rows."""
    plain = features(np.random.default_rng(1), N)
    stored = [[encode(np.asarray(block), dtype) for block in shards] for shards in plain.blocks]
    made = TrajectoryFeatures(stored)
    decoded = np.stack([np.concatenate([np.asarray(b, np.float64) for b in shards]) for shards in stored])
    assert (len(made), made.checkpoints) == (N, T)
    np.testing.assert_allclose(made.norms(), np.linalg.norm(decoded, axis=2), rtol=1e-12)
    directions = np.random.default_rng(2).standard_normal((D, 3))
    for t in range(T):
        np.testing.assert_array_equal(made.at(t), decoded[t])
        np.testing.assert_allclose(made.dot(t, directions), decoded[t] @ directions, rtol=1e-5, atol=1e-5 * 10.0**-t)
    target = np.random.default_rng(3).standard_normal((T, D))
    for unit in (True, False):
        matrix, _ = pursuit_problem(
            made, target, np.array([3e-4, 2e-4, 1e-4]), norms=made.norms() if unit else None, balance=False
        )
        rows = decoded / np.linalg.norm(decoded, axis=2, keepdims=True) if unit else decoded
        expected = np.sqrt([3e-4, 2e-4, 1e-4])[:, None, None] * rows
        found = matrix.columns(np.arange(N)).T.reshape(N, T, D).transpose(1, 0, 2)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounded_features_choose_what_exact_ones_choose(dtype: str) -> None:
    """A target planted in a few pool rows: gtp and less name the same examples from the rounded rows."""
    rng = np.random.default_rng(0)
    U = [(10.0**-t) * rng.standard_normal((N, 512)).astype(np.float32) for t in range(T)]
    planted = np.arange(0, N, 8)
    goal = [u[planted] + 0.01 * 10.0**-t * rng.standard_normal((5, 512)).astype(np.float32) for t, u in enumerate(U)]
    chosen = {}
    for kind in ("float32", dtype):
        given = replace(
            problem(),
            pool=dict.fromkeys(
                ("adam-symmetric", "adam-uncorrected"), TrajectoryFeatures([[encode(u, kind)] for u in U])
            ),
            target=dict.fromkeys(("adam-symmetric", "identity"), TrajectoryFeatures([[encode(g, kind)] for g in goal])),
            groups=np.zeros(5, dtype=np.int64),
        )
        chosen[kind] = [
            set(strategy(name).select(given, 5, seed=0).indices.tolist()) for name in ("gtp", "omp", "less")
        ]
    assert chosen[dtype] == chosen["float32"] == [set(planted.tolist())] * 3


def test_balanced_checkpoints_have_equal_targets() -> None:
    matrix_b = problem(balance=True).matching()[1].reshape(T, D)
    shares = np.linalg.norm(matrix_b, axis=1) ** 2
    np.testing.assert_allclose(shares, [3e-4, 2e-4, 1e-4], rtol=1e-6)


def test_checkpoints_that_do_not_count_are_as_if_they_were_not_there() -> None:
    whole, second = problem(), problem(checkpoints=[2])
    A, b = second.matching()
    columns = np.asarray(A.columns(np.arange(A.shape[1]))).reshape(T, D, -1)
    exact = np.asarray(whole.matching()[0].columns(np.arange(A.shape[1]))).reshape(T, D, -1)
    np.testing.assert_array_equal(columns[1], exact[1])
    np.testing.assert_array_equal(b.reshape(T, D)[1], whole.matching()[1].reshape(T, D)[1])
    for t in {*range(T)} - {1}:
        assert not columns[t].any()
        assert not b.reshape(T, D)[t].any()
    zeros = np.zeros((M, D), dtype=np.float32)
    gone = {name: TrajectoryFeatures([[zeros], *f.blocks[1:]]) for name, f in second.target.items()}
    replace(second, target=gone).matching()  # a target that is zero where nothing counts
    with pytest.raises(SelectionError, match=rf"there is no checkpoint {T + 1}; the trajectory has {T}"):
        problem(checkpoints=[1, T + 1]).matching()


def test_zero_target_is_refused() -> None:
    pool = features(np.random.default_rng(0), N)
    with pytest.raises(SelectionError, match="zero at checkpoint 2"):
        pursuit_problem(pool, np.array([[1.0] * D, [0.0] * D, [1.0] * D]), np.ones(T), norms=None, balance=True)


def test_less_equals_a_hand_computation() -> None:
    given = problem()
    scores = np.zeros((N, 2))
    for t, rate in enumerate(given.rates):
        rows = np.concatenate(given.pool["adam-uncorrected"].blocks[t]).astype(np.float64)
        goal = np.concatenate(given.target["identity"].blocks[t]).astype(np.float64)
        goal /= np.linalg.norm(goal, axis=1, keepdims=True)
        for group, members in enumerate((goal[:4], goal[4:])):
            cosine = rows @ members.mean(axis=0) / np.linalg.norm(rows, axis=1)
            scores[:, group] += rate / given.rates.sum() * cosine
    np.testing.assert_allclose(LESS().on_groups(given), scores, rtol=1e-4, atol=1e-6)
    chosen = strategy("less").select(given, 7, seed=0)
    assert set(chosen.indices) == set(np.argsort(-scores.max(axis=1))[:7])
    assert np.all(np.diff(chosen.evidence["scores"]) <= 0)
    assert np.all(chosen.weights == 1)


def test_pursuits_choose_distinct_examples_with_weights_of_mean_one() -> None:
    for name in ("gtp", "omp"):
        chosen = strategy(name).select(problem(), 8, seed=0)
        assert 0 < len(chosen.indices) <= 8
        assert len(set(chosen.indices.tolist())) == len(chosen.indices)
        assert (chosen.weights > 0).all()
        assert chosen.weights.mean() == pytest.approx(1)
        assert 0 < chosen.evidence["relative_residual"] < 1
        residuals = [record["relative_residual"] for record in chosen.evidence["path"] if record["layer"] == 1]
        assert residuals[0] == 1
        assert residuals[-1] == chosen.evidence["relative_residual"]


def test_gtp_fits_the_target_better_than_random_and_saturation_is_told() -> None:
    given = problem()
    matrix, b = given.matching()
    chosen = strategy("gtp").select(given, 8, seed=0)

    def residual(ids: np.ndarray) -> float:
        A = matrix.columns(ids).astype(np.float64)
        return float(np.linalg.norm(b - A @ np.linalg.lstsq(A, b, rcond=None)[0]))

    draws = [residual(strategy("random").select(given, 8, seed).indices) for seed in range(20)]
    assert residual(chosen.indices) < min(draws)
    stopped = strategy("gtp").select(problem(saturation="stop", alpha=0.0), N, seed=0)
    assert len(stopped.indices) < N
    assert stopped.evidence["stop_reason"][0] in ("saturated", "no positive correlation")
    layered = strategy("gtp").select(problem(saturation="layers", alpha=0.0), N // 2, seed=0)
    assert len(layered.indices) >= len(stopped.indices)
    assert layered.layers.max() > 1


def test_no_positive_correlation_is_an_error() -> None:
    given = problem()
    target = TrajectoryFeatures([[np.ones((M, D), np.float32)]] * T)
    pool = TrajectoryFeatures([[-np.ones((N, D), np.float32)]] * T)
    opposed = SelectionProblem(
        given.ids,
        {"adam-symmetric": pool},
        {"adam-symmetric": target},
        given.groups,
        given.rates,
        given.gradients,
        given.pursuit,
    )
    with pytest.raises(SelectionError, match="no positive correlation"):
        strategy("gtp").select(opposed, 4, seed=0)


def test_random_is_seeded_and_uniform() -> None:
    choose = strategy("random").select
    assert choose(problem(), 9, 5).indices.tolist() == choose(problem(), 9, 5).indices.tolist()
    counts = np.bincount(np.concatenate([choose(problem(), 10, seed).indices for seed in range(400)]), minlength=N)
    assert counts.sum() == 4000
    assert abs(counts - 100).max() < 50  # five standard deviations


def test_every_listed_strategy_names_itself_and_unknown_ones_are_refused() -> None:
    for name in STRATEGIES:
        assert strategy(name).name == name
        assert strategy(name).source
    with pytest.raises(ConfigError, match="did you mean 'less'"):
        strategy("les")


def test_derived_seeds_differ_by_use_and_seed() -> None:
    seeds = [derive_seed(seed, use) for seed in range(50) for use in ("a", "b", "c")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
