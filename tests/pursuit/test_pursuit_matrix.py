"""The matrices: every operation against the explicit array, and every refusal."""

import ml_dtypes
import numpy as np
import pytest
import torch

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit import DenseMatrix, GradientMatrix, GradientTrajectoryPursuit, TrajectoryMatrix, as_matrix
from gradpursuit.pursuit import matrix as matrix_module
from gradpursuit.pursuit import rows as rows_module

TYPES = [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def stacked(blocks, scale):
    parts = [scale[t][:, None] * np.concatenate(shards).astype(np.float64) for t, shards in enumerate(blocks)]
    return np.concatenate(parts, axis=1).T


def trajectory(rng, dtype, widths=(7, 4, 9), rows=(5, 1, 11)):
    size = 40 if dtype == np.int8 else 1
    blocks = [[(size * rng.standard_normal((n, d))).astype(dtype) for n in rows] for d in widths]
    return blocks, rng.uniform(0.2, 3.0, (len(widths), sum(rows)))


def assert_same_operations(made, A, tol):
    rng = np.random.default_rng(1)
    ids = rng.permutation(A.shape[1])[:9]
    r, x = rng.standard_normal(A.shape[0]), rng.standard_normal(9)
    assert made.shape == A.shape
    np.testing.assert_allclose(made.correlate(r), A.T @ r, atol=tol)
    np.testing.assert_allclose(made.columns(ids), A[:, ids], atol=tol)
    np.testing.assert_allclose(made.combine(ids, x), A[:, ids] @ x, atol=tol)
    np.testing.assert_allclose(made.squared_norms(), (A**2).sum(0), rtol=10 * tol)
    assert made.columns(ids[:0]).shape == (A.shape[0], 0)
    assert not made.combine(ids[:0], x[:0]).any()
    assert made.correlate(r).dtype == made.combine(ids, x).dtype == made.squared_norms().dtype == np.float64


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("piece_bytes", "threads"), [(8 * 2**20, 1), (100, 1), (100, 3)])
def test_trajectory_matrix_is_the_stacked_matrix(dtype, piece_bytes, threads, monkeypatch):
    monkeypatch.setattr(rows_module, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(rows_module, "_threads", lambda: threads)
    blocks, scale = trajectory(np.random.default_rng(0), dtype)
    made = TrajectoryMatrix(blocks, scale)
    assert isinstance(made, GradientMatrix)
    tol = {np.float64: 1e-12, np.int8: 1e-3}.get(dtype, 1e-5)
    assert_same_operations(made, stacked(blocks, scale), tol)
    assert_same_operations(TrajectoryMatrix(blocks), stacked(blocks, np.ones_like(scale)), tol)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [1, 31, 1024, 1025, 8192])
def test_correlate_is_within_the_stated_error(dtype, d):
    """1e-6 of ‖row‖‖r‖ against float64 on the same stored values, whatever the length; 1e-15 for float64."""
    blocks, _ = trajectory(np.random.default_rng(d), dtype, widths=(d,), rows=(37, 2, 1))
    r = np.random.default_rng(1).standard_normal(d)
    A = stacked(blocks, np.ones((1, 40)))
    error = np.abs(TrajectoryMatrix(blocks).correlate(r) - A.T @ r)
    bound = 1e-15 if dtype == np.float64 else 1e-6
    assert (error <= bound * np.linalg.norm(A, axis=0) * np.linalg.norm(r)).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_every_value_of_a_type_is_read_as_it_is(dtype):
    """All bit patterns of the short types: subnormals, both zeros and infinities among them."""
    bits = 8 * np.dtype(dtype).itemsize
    if bits <= 16:
        values = np.arange(2**bits, dtype=f"u{bits // 8}").view(dtype).reshape(-1, 64)
        with np.errstate(invalid="ignore"):
            values = values[np.isfinite(values.astype(np.float64)).all(axis=1)]
    else:
        values = np.array([[0.0, -0.0, 1e-40, -1e-40, 1e-3, 3e38, np.finfo(np.float32).max, -1]], dtype)
    made = TrajectoryMatrix([[values]])
    ids = np.arange(len(values))
    np.testing.assert_array_equal(made.columns(ids).T, values.astype(np.float64))
    unit = np.eye(values.shape[1])
    np.testing.assert_array_equal(made.correlate(unit), values.astype(np.float64))


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    blocks, scale = trajectory(np.random.default_rng(0), np.float16, widths=(3000,), rows=(50, 70))
    ids = np.random.default_rng(1).permutation(120)[:60]
    monkeypatch.setattr(rows_module, "_PIECE_BYTES", 60_000)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(rows_module, "_threads", lambda threads=threads: threads)
        made = TrajectoryMatrix(blocks, scale)
        r = np.linspace(-1, 1, 3000)
        found.append((made.correlate(r), made.combine(ids, r[:60]), made.columns(ids), made.squared_norms()))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_several_residuals_in_one_pass():
    blocks, scale = trajectory(np.random.default_rng(0), np.float32)
    R = np.random.default_rng(1).standard_normal((20, 4))
    np.testing.assert_allclose(TrajectoryMatrix(blocks, scale).correlate(R), stacked(blocks, scale).T @ R, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_need_not_be_contiguous_nor_writable(dtype):
    rng = np.random.default_rng(0)
    wide = (40 * rng.standard_normal((18, 20))).astype(dtype)
    wide.flags.writeable = False
    for values in (wide[:, 3:17], wide[::2], wide[:, ::-1], np.asfortranarray(wide)):
        assert_same_operations(TrajectoryMatrix([[values]]), values.astype(np.float64).T, 1e-3)


def test_types_may_be_mixed():
    U = np.random.default_rng(0).standard_normal((20, 6))
    mixed = [U[:9], U[9:].astype(np.float16)]
    made, expected = TrajectoryMatrix([mixed]), np.concatenate(mixed)
    assert_same_operations(made, expected.T, 1e-5)
    np.testing.assert_allclose(made.correlate(U[0])[:9], U[:9] @ U[0], rtol=1e-13)
    np.testing.assert_array_equal(made.columns(np.arange(20)).T, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_planted_selection_is_found_in_any_type(tmp_path, dtype):
    """A target made of 12 of 400 rows: the same support from the rounded rows as from the exact ones."""
    from gradpursuit.store.encoding import encode

    rng = np.random.default_rng(0)
    U = [1e-5 * rng.standard_normal((400, 256)).astype(np.float32) for _ in range(2)]
    planted = np.sort(rng.permutation(400)[:12])
    b = np.concatenate([rng.uniform(1, 2, 12) @ u[planted].astype(np.float64) for u in U])
    exact = GradientTrajectoryPursuit(12, alpha=1e-3).fit(TrajectoryMatrix([[u] for u in U]), b)
    np.testing.assert_array_equal(np.sort(exact.support_), planted)
    stored = [encode(u, dtype) for u in U]
    scale = [np.ones(400) if block.scale is None else block.scale for block in stored]
    found = GradientTrajectoryPursuit(12, alpha=1e-3).fit(TrajectoryMatrix([[s.values] for s in stored], scale), b)
    np.testing.assert_array_equal(np.sort(found.support_), planted)
    np.testing.assert_allclose(found.coef_[planted], exact.coef_[planted], rtol=0.02)


def test_checkpoints_may_be_sharded_differently():
    rng = np.random.default_rng(0)
    U = [rng.standard_normal((12, 3)), rng.standard_normal((12, 5))]
    made = TrajectoryMatrix([np.split(U[0], [4, 5]), np.split(U[1], [10])])
    assert_same_operations(made, np.concatenate(U, axis=1).T, 1e-12)


def test_memory_mapped_shards(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 6)).astype(np.float16)
    np.save(tmp_path / "a.npy", values)
    made = TrajectoryMatrix([[np.load(tmp_path / "a.npy", mmap_mode="r")]])
    assert_same_operations(made, values.astype(np.float64).T, 1e-5)


@pytest.mark.parametrize("piece_bytes", [64 * 2**20, 100])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("dtype", "tol"), [(np.float16, 1e-5), (np.float32, 1e-5), (np.float64, 1e-12)])
def test_dense_matrix(dtype, tol, order, piece_bytes, monkeypatch):
    monkeypatch.setattr(matrix_module, "_PIECE_BYTES", piece_bytes)
    A = np.asarray(np.random.default_rng(0).standard_normal((13, 20)).astype(dtype), order=order)
    assert_same_operations(DenseMatrix(A), A.astype(np.float64), tol)


def test_torch_tensors_are_read_without_a_copy():
    features = torch.randn(20, 13, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = DenseMatrix(features.T)
    assert_same_operations(made, features.detach().numpy().T.astype(np.float64), 1e-5)
    with torch.no_grad():
        features[3] = 5.0
    np.testing.assert_array_equal(made.columns(np.array([3])), np.full((13, 1), 5.0))
    half = torch.randn(20, 13).to(torch.bfloat16)
    assert_same_operations(DenseMatrix(half.T), half.float().numpy().T.astype(np.float64), 1e-5)
    named = half.float().numpy().astype(ml_dtypes.bfloat16)
    assert_same_operations(DenseMatrix(named.T), half.float().numpy().T.astype(np.float64), 1e-5)


def test_as_matrix_keeps_a_matrix():
    made = DenseMatrix(np.ones((2, 3)))
    assert as_matrix(made) is made
    assert isinstance(as_matrix([[1, 2], [3, 4]]), DenseMatrix)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"0 feature.* \(shape=\(3, 0\)\)"),
        (np.array([[1.0, np.nan]]), "first is atom 1"),
        (np.array([[np.inf, 1.0]]), "first is atom 0"),
        (np.array([[1j]]), "not real numbers"),
        (np.array([["a"]]), "not real numbers"),
    ],
)
def test_dense_refusals(X, message):
    with pytest.raises(PursuitError, match=message):
        as_matrix(X)


@pytest.mark.parametrize(
    ("blocks", "scale", "message"),
    [
        ([], None, "at least one checkpoint"),
        ([[]], None, "at least one checkpoint"),
        ([[np.ones((3, 2)), np.ones((3, 4))]], None, r"widths \[2, 4\]"),
        ([[np.ones((3, 2))], [np.ones((4, 2))]], None, r"\[3, 4\] rows"),
        ([[np.ones(3)]], None, r"shape \(3,\)"),
        ([[np.ones((3, 2), dtype=np.int16)]], None, "type int16; shards are arrays .* of int8, float16, bfloat16"),
        ([[np.ones((0, 2))]], None, "nothing to select"),
        ([[np.ones((3, 2))]], np.ones((2, 3)), r"need \(1, 3\)"),
        ([[np.ones((3, 2))]], np.array([[1.0, np.inf, 1.0]]), r"scale\[0, 1\] is inf"),
    ],
)
def test_trajectory_refusals(blocks, scale, message):
    with pytest.raises(PursuitError, match=message):
        TrajectoryMatrix(blocks, scale)


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != np.int8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_trajectory_finds_values_that_are_not_finite(dtype, value):
    U = np.ones((5, 2), dtype=dtype)
    U[3, 1] = value
    with pytest.raises(PursuitError, match="first is atom 3"):
        TrajectoryMatrix([[np.ones((5, 2))], [U[:2], U[2:]]]).squared_norms()


@pytest.mark.parametrize("ids", [[-1], [3]])
def test_ids_outside_the_matrix_are_refused(ids):
    for made in (DenseMatrix(np.ones((2, 3))), TrajectoryMatrix([[np.ones((3, 2))]])):
        with pytest.raises(PursuitError, match=r"0\.\.2"):
            made.columns(np.array(ids))
        with pytest.raises(PursuitError, match=r"0\.\.2"):
            made.combine(np.array(ids), np.ones(1))


@pytest.mark.parametrize("blocks", [np.eye(3), [np.eye(3)]])
def test_an_array_in_place_of_shards_is_refused(blocks):
    with pytest.raises(PursuitError, match=r"\[\[U\]\] for one array U"):
        TrajectoryMatrix(blocks)
