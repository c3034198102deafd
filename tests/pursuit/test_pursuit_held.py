"""The columns in memory: what is held, who is alike, and sums over rows."""

import ml_dtypes
import numpy as np
import pytest
from test_pursuit_gtp import low_rank

from gradpursuit.pursuit import DenseMatrix, GradientTrajectoryPursuit
from gradpursuit.pursuit import held as held_module
from gradpursuit.pursuit import rows as rows_module
from gradpursuit.pursuit.held import HeldColumns
from gradpursuit.pursuit.refit import GramRefit
from gradpursuit.pursuit.rows import Rows

RNG = np.random.default_rng


def columns(kind, D, N, dtype):
    """N columns, with lengths from 1e-3 to 1e3."""
    rng = RNG(D + N)
    if kind == "random":
        A = rng.standard_normal((D, N))
    elif kind == "clustered":
        spread = 10.0 ** rng.uniform(-5, 0.5, N)
        A = rng.standard_normal((D, 5))[:, rng.integers(0, 5, N)] + spread * rng.standard_normal((D, N)) / np.sqrt(D)
    elif kind == "sparse":  # one or two entries each: the least favourable for random signs
        A = np.zeros((D, N))
        A[rng.integers(0, D, N), np.arange(N)] = 1.0
        A[rng.integers(0, D, N), np.arange(N)] += 10.0 ** rng.uniform(-4, 0, N)
    else:
        A = rng.standard_normal((D, N // 2))[:, rng.integers(0, N // 2, N)]
    return (A * 10.0 ** rng.uniform(-3, 3, N)).astype(dtype)


@pytest.mark.parametrize("coherence", [0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("D", [3, 63, 64, 65, 1000])
@pytest.mark.parametrize("kind", ["random", "clustered", "sparse", "copied"])
def test_alike_misses_nothing(kind, D, dtype, coherence, monkeypatch):
    monkeypatch.setattr(held_module, "_PIECE_BYTES", 20_000)
    A = columns(kind, D, 160, dtype)
    X = DenseMatrix(A)
    held = HeldColumns(X, np.ones((D, 1)), np.sqrt(X.squared_norms()), 10)
    held.load(RNG(1).permutation(160))
    ids, others = RNG(2).permutation(160)[:90], RNG(3).permutation(160)[:120]
    unit = A.astype(np.float64) / np.linalg.norm(A.astype(np.float64), axis=0)
    cosines = unit[:, ids].T @ unit[:, others]
    found = np.zeros_like(cosines, dtype=bool)
    for place, near in held.alike(ids, others, coherence):
        found[place, near] = True
        np.testing.assert_allclose(held.cosines(ids[place], others[near]), cosines[place, near], atol=1e-12)
    alike = (cosines >= min(coherence, 1 - 1e-12)) & (ids[:, None] != others)
    assert not found[ids[:, None] == others].any()
    assert alike.any() or kind != "copied"
    assert found[alike].all()
    if coherence >= 0.99 and D == 1000:  # and it does spare work
        assert not found[cosines < 0.5].any()


@pytest.mark.parametrize("max_coherence", [1.0, 0.999, 0.8])
def test_no_two_chosen_atoms_are_copies(max_coherence):
    for seed in range(3):
        rng = RNG(seed)
        A, b = low_rank(seed, N=100)
        A = np.concatenate([A, A * rng.uniform(0.5, 2.0, 100), A + 0.02 * rng.standard_normal(A.shape)], axis=1)
        found = GradientTrajectoryPursuit(60, max_coherence=max_coherence).fit(A, b)
        unit = A[:, found.support_] / np.linalg.norm(A[:, found.support_], axis=0)
        assert (unit.T @ unit - 2 * np.eye(len(unit.T))).max() < min(max_coherence, 1 - 1e-12)
        whole = A / np.linalg.norm(A, axis=0)
        assert found.copies_
        assert set(found.copies_.values()) <= set(range(300)) - set(found.copies_)
        if max_coherence >= 0.999:  # below, being a copy is not transitive
            assert all(whole[:, i] @ whole[:, j] >= max_coherence - 1e-12 for i, j in found.copies_.items())


def test_what_is_held_is_what_the_matrix_has(monkeypatch):
    """Against a dictionary, through random loads, keeps and releases."""
    monkeypatch.setattr(held_module, "_PIECE_BYTES", 2_000)
    rng = RNG(0)
    A, targets = rng.standard_normal((70, 90)).astype(np.float32), rng.standard_normal((70, 2))
    X = DenseMatrix(A)
    held = HeldColumns(X, targets, np.sqrt(X.squared_norms()), 20)
    gram, expected, fetched, serials = GramRefit(held, targets), set(), 0, set()
    for turn in range(60):
        ids = rng.permutation(90)[: rng.integers(0, 40)]
        before = set(held.serials.tolist())
        if turn % 3 == 0:
            held.keep(ids)
            expected &= set(ids.tolist())
            assert set(held.serials.tolist()) == before
        elif turn % 17 == 0:
            held.release()
            expected = set()
        else:
            held.load(ids)
            new = set(ids.tolist()) - expected
            fetched, expected = fetched + len(new), expected | new
            loaded = set(held.serials.tolist()) - before
            assert len(loaded) == len(new)
            assert not loaded & serials
            serials |= loaded
        mine = held.ids[held.ids >= 0]
        assert set(mine.tolist()) == expected
        assert len(mine) == len(expected)
        assert len(set(held.serials.tolist())) == len(held.serials)
        assert held.fetched_bytes == fetched * 70 * 4
        np.testing.assert_array_equal(held.ids[held.slots(mine)], mine)
        np.testing.assert_array_equal(held.entries(held.slots(mine)), A.T[mine])
        np.testing.assert_allclose(held.atb(mine), A.T[mine] @ targets, atol=1e-4)
        np.testing.assert_allclose(gram.gram(mine), A.T[mine].astype(np.float64) @ A[:, mine], atol=1e-10)
        if mine.size:
            products = held.rows().dots(targets.T, held.slots(mine))
            np.testing.assert_allclose(products, A.T[mine] @ targets, atol=1e-4)
    assert expected


def test_keeping_takes_no_memory_and_releasing_gives_it_back():
    A = RNG(0).standard_normal((50, 40)).astype(np.float32)
    X = DenseMatrix(A)
    held = HeldColumns(X, np.ones((50, 1)), np.sqrt(X.squared_norms()), 30)
    held.load(np.arange(30))
    memory = held.entries(slice(0, 30))
    held.keep(np.array([29, 3, 7]))
    np.testing.assert_array_equal(np.flatnonzero(held.ids >= 0), [3, 7, 29])  # where they were
    held.load(np.arange(30, 40))
    assert np.shares_memory(held.entries(slice(None)), memory)  # in the slots that are free
    np.testing.assert_array_equal(memory[[0, 1, 2, 3, 4, 7, 29]], A.T[[30, 31, 32, 3, 33, 7, 29]])
    held.release()
    assert len(held.entries(slice(None))) == 0
    held.load(np.array([5]))
    np.testing.assert_array_equal(held.entries(held.slots(np.array([5]))), A.T[[5]])


def test_columns_of_a_wider_type_may_follow():
    class Mixed(DenseMatrix):
        def columns(self, ids):
            wide = super().columns(ids)
            return wide if (ids > 5).any() else wide.astype(np.float32)

    A = RNG(0).standard_normal((8, 12))
    X = Mixed(A)
    held = HeldColumns(X, np.ones((8, 1)), np.sqrt(X.squared_norms()), 4)
    held.load(np.array([1, 2]))
    held.load(np.array([7]))
    np.testing.assert_array_equal(held.entries(held.slots(np.array([7])))[0], A[:, 7])
    np.testing.assert_array_equal(held.entries(held.slots(np.array([2])))[0], A[:, 2].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_dots_of_some_rows_across_shards(dtype, threads, monkeypatch):
    monkeypatch.setattr(rows_module, "_PIECE_BYTES", 300)
    monkeypatch.setattr(rows_module, "_threads", lambda: threads)
    rng = RNG(0)
    whole = (20 * rng.standard_normal((41, 33))).astype(dtype)
    made, exact = Rows(np.split(whole, [5, 6, 30]), "a test"), whole.astype(np.float64)
    R = rng.standard_normal((3, 33))
    bound = (
        (1e-15 if dtype == np.float64 else 1e-6) * np.linalg.norm(exact, axis=1)[:, None] * np.linalg.norm(R, axis=1)
    )
    for ids in (
        rng.permutation(41),
        np.array([40, 0, 5, 29, 30, 6]),
        np.array([5]),
        np.arange(6, 30),
        np.empty(0, int),
    ):
        found = made.dots(R, ids)
        assert found.shape == (len(ids), 3)
        assert (np.abs(found - exact[ids] @ R.T) <= bound[ids]).all()
    np.testing.assert_array_equal(made.dots(R), made.dots(R, np.arange(41)))


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.float64])
def test_sums_do_not_depend_on_threads(dtype, monkeypatch):
    rng = RNG(0)
    whole = (20 * rng.standard_normal((300, 257))).astype(dtype)
    made = Rows(np.split(whole, [17, 200]), "a test")
    ids, weights = rng.permutation(300)[:250], rng.standard_normal(250)
    monkeypatch.setattr(rows_module, "_SUM_BYTES", 4_000)
    sums = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(rows_module, "_threads", lambda threads=threads: threads)
        sums.append(made.combine(ids, weights))
    np.testing.assert_allclose(sums[0], weights @ whole[ids].astype(np.float64), atol=1e-9)
    for other in sums[1:]:
        np.testing.assert_array_equal(other, sums[0])
